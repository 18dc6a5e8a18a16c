const {features, density, settings, dashboards = {}, ...plots} = JSON.parse(document.getElementById("plots").textContent);
const view = document.getElementById("view");
const [metric, pair] = ["metric", "pair"].map((id) => document.getElementById(id));

// what a plot's hover shows, as text on one line
const plain = (hover) => hover.replaceAll("<br>", ", ").replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

function show(id, shown) {
  document.getElementById(id).closest("figure").hidden = !shown;
}

function drawFeatures() {
  const seen = features.views[view.value];
  show("features", seen);
  if (!seen) return;
  const {features: names, z} = seen;
  const several = names.length > 12;
  const slanted = names.some((name) => name.length > 6);
  const height = Math.max(220, 30 * features.tokens.length + (slanted ? 190 : 90));
  const largest = Math.max(1, ...z.flat());
  const cell = getComputedStyle(document.documentElement).getPropertyValue("--cell").trim();
  document.getElementById("features").style.height = `${height}px`;
  draw("features", [{
    type: "heatmap", z, zmin: 0, zmax: largest, xgap: 1, ygap: 1,
    colorscale: [[0, `rgba(${cell},.05)`], [1, `rgba(${cell},.75)`]],
    colorbar: {thickness: 12},
    texttemplate: several ? "" : "%{z:.2f}",
    textfont: {color: getComputedStyle(document.body).color},
    hoverinfo: "text",
    hovertext: z.map((row, i) => row.map((value, j) => `${features.tokens[i]}<br>feature ${names[j]}: ${value}`)),
  }], {
    height,
    xaxis: {title: {text: "feature"}, showgrid: false, zeroline: false,
            ...(several ? {visible: false} : {tickvals: [...names.keys()], ticktext: names, tickangle: slanted ? -40 : 0})},
    yaxis: {autorange: "reversed", showgrid: false, zeroline: false,
            tickvals: [...features.tokens.keys()], ticktext: features.tokens},
  });
}

function drawDensity() {
  const latents = density.views[view.value];
  show("density", latents);
  if (!latents) return;
  draw("density", [{
    type: "bar", x: density.middles, y: latents, width: density.width * 0.9,
    marker: {color: "#2c6fbb"}, hovertemplate: "%{y} latents<extra></extra>",
  }], {
    xaxis: {title: {text: "share of rows on which a latent is active"}, range: [-10.2, 0.2],
            tickvals: [-10, -8, -6, -4, -2, 0], ticktext: ["0", "1e-8", "1e-6", "1e-4", "1%", "100%"]},
    yaxis: {title: {text: "latents"}},
  });
}

function drawInside() {
  if (!view) return;
  if (features) drawFeatures();
  if (density) drawDensity();
  const member = view.value;
  const link = Object.assign(document.createElement("a"), {href: dashboards[member], textContent: `The dashboard of member ${member}`});
  const known = features?.views[member] || density?.views[member];
  const without = `This page holds the numbers of member ${member} alone; sae-jax features makes its dashboard.`;
  document.getElementById("chosen").replaceChildren(member in dashboards ? link : known ? "" : without);
  mark(member);
}

function drawSettings() {
  const shown = settings[pair?.value ?? 0];
  const chosen = shown[metric.value] ?? Object.values(shown)[0];
  draw("axes", chosen.data, chosen.layout);
}

function drawAll() {
  for (const [id, {data, layout}] of Object.entries(plots)) {
    draw(id, data, {...layout, showlegend: data.some((trace) => trace.legendgroup)});
  }
  if (settings) drawSettings();
  drawInside();
}

function mark(member) {
  for (const row of document.querySelectorAll(".members [aria-current]")) row.removeAttribute("aria-current");
  const row = document.querySelector(`.members tr[data-member="${member}"]`);
  row?.setAttribute("aria-current", "true");
  return row;
}

// its dashboard, or what the page has of it
function go(member, told) {
  if (member in dashboards) location.href = dashboards[member];
  else if (view) {
    if (![...view.options].some((each) => each.value === member)) view.add(new Option(told, member));
    view.value = member;
    drawInside();
    view.closest("section").scrollIntoView();
    view.focus({preventScroll: true});
  } else mark(member)?.scrollIntoView({block: "center"});
}

function listen(id) {
  let pressed = null;
  document.getElementById(id).on("plotly_click", ({points: [point]}) => {
    if (point.customdata === undefined) return;
    const member = String(point.customdata);
    // a finger cannot point without pressing: the first press shows what it is
    if (!touch || pressed === member) go(member, plain(point.hovertext));
    pressed = member;
  });
}

function sortBy(heading) {
  const place = heading.cellIndex;
  const body = heading.closest("table").tBodies[0];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const numbers = new Map();
  const number = (row) => Number(row.cells[place].dataset.v.replace(/^(-?)inf$/, "$1Infinity"));
  for (const row of body.rows) numbers.set(row, number(row));
  const text = [...numbers.keys()].some((row) => /^[^\d.+-]/.test(row.cells[place].dataset.v)
    && !/^(nan|inf)$/.test(row.cells[place].dataset.v));
  // what is no number stays at the end, whichever way
  const compare = text
    ? (a, b) => direction * a.cells[place].dataset.v.localeCompare(b.cells[place].dataset.v, "en", {numeric: true})
    : (a, b) => {
      const [first, second] = [numbers.get(a), numbers.get(b)];
      if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second);
      return first === second ? 0 : direction * (first < second ? -1 : 1);
    };
  body.append(...[...body.rows].sort(compare));
  for (const each of heading.parentNode.cells) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

drawAll();
view?.addEventListener("change", drawInside);
metric?.addEventListener("change", drawSettings);
pair?.addEventListener("change", drawSettings);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
for (const id of Object.keys(plots).filter((each) => plots[each].data.some((trace) => trace.customdata))) listen(id);
for (const heading of document.querySelectorAll(".members th")) {
  heading.firstChild.addEventListener("click", () => sortBy(heading));
}
for (const button of document.querySelectorAll(".members td button")) {
  const {cells, dataset} = button.closest("tr");
  const [, ...names] = button.closest("table").tHead.rows[0].cells;
  const told = names.map((name, place) => `${name.textContent} ${cells[place + 1].textContent}`);
  button.addEventListener("click", () => go(dataset.member, [`member ${dataset.member}`, ...told].join(", ")));
}
