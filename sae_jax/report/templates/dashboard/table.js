// All features: filtered, sorted, and a page of them at a time.
const ROWS = 50;
const COMPARE = new Intl.Collator("en", {numeric: true}).compare;
let table; // of data/table.js
let labels; // by feature
let order = []; // the features that the filters leave, sorted
let sorted = {column: "feature", direction: 1};
let page = 0;

function density(feature) {
  return table.fired[feature] / Math.max(table.rows, 1);
}

function peaks(feature) {
  return (table.peaks?.[feature] ?? []).slice(0, 4).map((number) => spelled(word(number)));
}

const COLUMNS = {
  feature: (feature) => feature,
  label: (feature) => labels.get(feature) ?? "",
  peaks: (feature) => peaks(feature)[0] ?? "",
  density,
  ...Object.fromEntries(["mean", "largest", "norm", "cosine", "again"].map((name) => [name, (feature) => table[name][feature]])),
};

function wanted(id, otherwise) {
  const text = byId(id).value;
  return text === "" ? otherwise : Number(text);
}

// a feature whose label, number, peaks or promoted tokens hold the text
function matching(text) {
  if (text === "") return () => true;
  const found = new Set();
  held.get("words").forEach((each, number) => { if (each.toLowerCase().includes(text)) found.add(number); });
  const among = (numbers) => numbers?.some((number) => found.has(number));
  return (feature) => String(feature) === text || labels.get(feature)?.toLowerCase().includes(text)
    || among(table.peaks?.[feature]) || among(table.promoted?.[feature]);
}

function filtered() {
  const matches = matching(byId("search").value.trim().toLowerCase());
  const which = byId("which").value;
  const [rare, dense] = [wanted("density-from", 0) / 100, wanted("density-to", Infinity) / 100];
  const [least, most] = [wanted("norm-from", -Infinity), wanted("norm-to", Infinity)];
  const kinds = {
    "": () => true, alive: (feature) => table.fired[feature] > 0, dead: (feature) => table.fired[feature] === 0,
    labelled: (feature) => labels.has(feature),
  };
  return [...table.fired.keys()].filter((feature) => {
    const [share, norm] = [density(feature), table.norm[feature]];
    return kinds[which](feature) && share >= rare && share <= dense
      && (norm === null ? least === -Infinity && most === Infinity : norm >= least && norm <= most) && matches(feature);
  });
}

function sort(features) {
  const value = COLUMNS[sorted.column];
  const values = new Map(features.map((feature) => [feature, value(feature)]));
  const missing = (each) => each === null || each === "";
  // what is missing stays at the end, whichever way
  return features.sort((a, b) => {
    const [first, second] = [values.get(a), values.get(b)];
    if (missing(first) || missing(second)) return missing(first) - missing(second) || a - b;
    const step = typeof first === "string" ? COMPARE(first, second) : first - second;
    return sorted.direction * step || a - b;
  });
}

function find() {
  order = sort(filtered());
  page = 0;
  byId("found").textContent = order.length === table.fired.length
    ? `${count(order.length)} features` : `${count(order.length)} of ${count(table.fired.length)} features`;
  drawTable();
  drawMap();
}

function cells(feature, columns) {
  const row = element("tr", {}, element("th", {scope: "row"}, element("a", {href: `#feature=${feature}`}, String(feature))));
  for (const column of columns.slice(1)) {
    if (column === "label") row.append(element("td", {className: "text"}, element("bdi", {}, cut(labels.get(feature) ?? ""))));
    else if (column === "peaks") row.append(element("td", {className: "text"}, ...peaks(feature).map((each) => element("bdi", {className: "word"}, each))));
    else row.append(element("td", {}, column === "density" ? percent(density(feature)) : short(COLUMNS[column](feature))));
  }
  return row;
}

function drawTable() {
  const headings = [...document.querySelectorAll(".features thead th")];
  for (const heading of headings) {
    if (heading.dataset.column !== sorted.column) heading.removeAttribute("aria-sort");
    else heading.setAttribute("aria-sort", sorted.direction > 0 ? "ascending" : "descending");
  }
  const columns = headings.map((heading) => heading.dataset.column);
  const shown = order.slice(page * ROWS, (page + 1) * ROWS);
  byId("rows").replaceChildren(...shown.map((feature) => cells(feature, columns)));
  const last = Math.max(Math.ceil(order.length / ROWS), 1);
  byId("page").textContent = `page ${count(page + 1)} of ${count(last)}`;
  byId("back").disabled = page === 0;
  byId("on").disabled = page + 1 >= last;
}

function turn(by) {
  page += by;
  drawTable();
  byId("rows").closest(".scroll").scrollTop = 0;
}

// numbers begin with the largest, words with the first
function sortBy(column) {
  const first = ["feature", "label", "peaks"].includes(column) ? 1 : -1;
  sorted = {column, direction: sorted.column === column ? -sorted.direction : first};
  find();
}

function listen() {
  for (const heading of document.querySelectorAll(".features thead th")) {
    heading.firstChild.addEventListener("click", () => sortBy(heading.dataset.column));
  }
  byId("filters").addEventListener("input", find);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(find));
  byId("back").addEventListener("click", () => turn(-1));
  byId("on").addEventListener("click", () => turn(1));
  byId("rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!event.target.closest("a") && getSelection().isCollapsed) row?.querySelector("a").click();
  });
}
