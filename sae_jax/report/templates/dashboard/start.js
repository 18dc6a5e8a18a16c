// Which view the address asks for, and the keys.
let shown = null; // the feature that is open
let left = 0; // how far the overview was scrolled

function show(view) {
  if (!byId("overview").hidden) left = scrollY;
  for (const id of ["overview", "feature", "passages"]) byId(id).hidden = id !== view;
  byId("trouble").hidden = true;
}

async function open(feature) {
  const name = String(Math.floor(feature / table.together)).padStart(4, "0");
  const some = await load(name);
  if (asked().feature !== feature) return; // another was asked for since
  drawFeature(feature, some[feature % table.together]);
  show("feature");
  scrollTo(0, 0);
  byId("h-feature").focus({preventScroll: true});
  shown = feature;
}

async function openPassage(chosen) {
  const passages = await load("passages");
  if (asked().passage !== chosen) return;
  const choosing = document.activeElement?.matches("#passages select");
  drawPassage(passages, chosen);
  show("passages");
  if (choosing) document.querySelector("#passages select").focus();
  else byId("h-passages").focus({preventScroll: true});
  shown = null;
}

function overview() {
  show("overview");
  scrollTo(0, left);
  if (shown !== null) reveal(shown);
  shown = null;
}

// the row of the feature that was open, on the page of the table that holds it
function reveal(feature) {
  const place = order.indexOf(feature);
  if (place < 0) return;
  page = Math.floor(place / ROWS);
  drawTable();
  byId("rows").querySelector(`a[href="#feature=${feature}"]`).focus({preventScroll: true});
}

function asked() {
  const [, view, number] = /^#(feature|passage)=(\d+)$/.exec(location.hash) ?? [];
  return view ? {[view]: Number(number)} : {};
}

async function route() {
  const {feature, passage} = asked();
  document.title = feature === undefined ? "Features" : `Feature ${feature}${labels.has(feature) ? `: ${labels.get(feature)}` : ""}`;
  try {
    if (feature >= table.fired.length) throw new Error(`There is no feature ${feature}: the last is ${table.fired.length - 1}.`);
    if (feature !== undefined) await open(feature);
    else if (passage !== undefined) await openPassage(passage);
    else overview();
  } catch (error) {
    overview();
    complain(error.message);
  }
}

function complain(sentence) {
  byId("trouble").textContent = sentence;
  byId("trouble").hidden = false;
}

function step(by) {
  const place = shown === null ? (by > 0 ? -1 : 0) : order.indexOf(shown);
  const next = order[place + by];
  if (next !== undefined) location.hash = `#feature=${next}`;
}

function search() {
  if (byId("overview").hidden) location.hash = "#features";
  // the view changes after this
  setTimeout(() => { byId("search").focus(); byId("search").select(); });
}

const KEYS = {
  j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
  n: () => { if (shown !== null) toggleNumbers(); },
  "/": search,
  Escape: () => { if (byId("overview").hidden) location.hash = "#features"; },
  "?": () => byId("help").showModal(),
};

function press(event) {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (typing && event.key === "Escape" && !event.target.closest("dialog")) event.target.blur();
  const scrolling = event.key.startsWith("Arrow") && event.target.closest(".scroll");
  if (typing || scrolling || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function start() {
  const missing = ["words", "table"].find((name) => !held.has(name));
  if (missing) return complain(`data/${missing}.js cannot be read: keep the files of this folder together.`);
  table = held.get("table");
  labels = new Map(table.labels.map(([feature, label]) => [feature, visible(label)]));
  startMap();
  listen();
  listenToMap();
  find();
  route();
  addEventListener("hashchange", route);
  addEventListener("keydown", press);
  byId("ask").addEventListener("click", () => byId("help").showModal());
}

addEventListener("DOMContentLoaded", start);
