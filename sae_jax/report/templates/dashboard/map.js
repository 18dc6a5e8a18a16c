// The decoder rows in a plane, coloured by how often each feature is active.
const RAMP = [[44, 111, 187], [168, 71, 158], [239, 125, 50]];
const STEPS = 16; // of the ramp
const MARGIN = 10; // pixels
const WHOLE = {left: 0, right: 10_000, low: 0, high: 10_000};
let frame = WHOLE; // what is in sight
let size = [0, 0]; // of the map in pixels
let box = null; // that is being drawn over it: two corners
let range = [-1, 0]; // of log densities

function ramp(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const first = Math.min(Math.floor(place), RAMP.length - 2);
  const mixed = RAMP[first].map((from, channel) => Math.round(from + (place - first) * (RAMP[first + 1][channel] - from)));
  return `rgb(${mixed.join(",")})`;
}

function startMap() {
  const logs = table.fired.filter((fired) => fired > 0).map((fired) => Math.log10(fired / table.rows)).sort((a, b) => a - b);
  // the middle 98 %, so that a few do not take all the colours
  const at = (share) => logs[Math.round(share * (logs.length - 1))];
  if (logs.length) range = [at(0.01), at(0.99)];
  byId("rarest").textContent = percent(10 ** range[0]);
  byId("densest").textContent = percent(10 ** range[1]);
  document.querySelector(".scale").hidden = logs.length === 0;
  document.querySelector(".ramp").style.background = `linear-gradient(90deg, ${[0, 0.5, 1].map(ramp).join(",")})`;
}

function at(feature) {
  return [
    MARGIN + (table.places[0][feature] - frame.left) / (frame.right - frame.left) * (size[0] - 2 * MARGIN),
    MARGIN + (frame.high - table.places[1][feature]) / (frame.high - frame.low) * (size[1] - 2 * MARGIN),
  ];
}

// points of one colour are one path: quicker than a path each
function drawMap() {
  const map = byId("map");
  if (map.clientWidth === 0) return;
  size = [map.clientWidth, map.clientHeight];
  const sharp = devicePixelRatio;
  [map.width, map.height] = size.map((side) => side * sharp);
  const pen = map.getContext("2d");
  pen.scale(sharp, sharp);
  const style = getComputedStyle(document.documentElement);
  const inside = new Set(order);
  const radius = Math.min(Math.max(220 / Math.sqrt(table.fired.length), 1.5), 4.5);
  const paths = new Map();
  table.fired.forEach((fired, feature) => {
    const share = (Math.log10(fired / table.rows) - range[0]) / (range[1] - range[0] || 1);
    const colour = !inside.has(feature) ? -2 : fired === 0 ? -1 : Math.round(Math.min(Math.max(share, 0), 1) * STEPS);
    if (!paths.has(colour)) paths.set(colour, new Path2D());
    const [across, down] = at(feature);
    paths.get(colour).moveTo(across + radius, down);
    paths.get(colour).arc(across, down, radius, 0, 2 * Math.PI);
  });
  for (const [colour, path] of [...paths].sort(([a], [b]) => a - b)) {
    pen.globalAlpha = colour === -2 ? 0.5 : 0.85;
    pen.fillStyle = colour < 0 ? style.getPropertyValue(colour === -2 ? "--rule" : "--quiet") : ramp(colour / STEPS);
    pen.fill(path);
  }
}

function nearest(across, down) {
  let [best, least] = [null, 30 ** 2];
  for (const feature of order) {
    const [x, y] = at(feature);
    const away = (x - across) ** 2 + (y - down) ** 2;
    if (away < least) [best, least] = [feature, away];
  }
  return best;
}

function place(id, left, top) {
  byId(id).style.left = `${left}px`;
  byId(id).style.top = `${top}px`;
}

function point(feature) {
  const note = byId("pointed");
  note.hidden = byId("ring").hidden = feature === null;
  byId("map").style.cursor = feature === null ? "" : "pointer";
  if (feature === null) return;
  const [across, down] = at(feature);
  const told = [labels.get(feature), peaks(feature).join(" ")].filter(Boolean).map((text) => [" ", element("bdi", {}, cut(text))]);
  note.replaceChildren(element("b", {}, String(feature)), ...told.flat(), ` ${percent(density(feature))}`);
  place("ring", across, down);
  place("pointed", Math.max(0, Math.min(across + 12, size[0] - note.offsetWidth)), down + 14);
}

function drawBox() {
  const drawn = box !== null && large();
  byId("box").hidden = !drawn;
  if (!drawn) return;
  place("box", Math.min(box.from[0], box.to[0]), Math.min(box.from[1], box.to[1]));
  byId("box").style.width = `${Math.abs(box.to[0] - box.from[0])}px`;
  byId("box").style.height = `${Math.abs(box.to[1] - box.from[1])}px`;
}

// a shake of the hand is no box
function large() {
  return Math.min(Math.abs(box.to[0] - box.from[0]), Math.abs(box.to[1] - box.from[1])) > 8;
}

function closer({from, to}) {
  const across = (x) => frame.left + (x - MARGIN) / (size[0] - 2 * MARGIN) * (frame.right - frame.left);
  const up = (y) => frame.high - (y - MARGIN) / (size[1] - 2 * MARGIN) * (frame.high - frame.low);
  const [left, right] = [across(Math.min(from[0], to[0])), across(Math.max(from[0], to[0]))];
  const [low, high] = [up(Math.max(from[1], to[1])), up(Math.min(from[1], to[1]))];
  frame = {left, right, low, high};
  byId("whole").hidden = false;
  drawMap();
}

function listenToMap() {
  const map = byId("map");
  map.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    map.setPointerCapture(event.pointerId);
    box = {from: [event.offsetX, event.offsetY], to: [event.offsetX, event.offsetY]};
  });
  map.addEventListener("pointermove", (event) => {
    if (box) box.to = [event.offsetX, event.offsetY];
    drawBox();
    point(box && large() ? null : nearest(event.offsetX, event.offsetY));
  });
  map.addEventListener("click", (event) => {
    const feature = nearest(event.offsetX, event.offsetY);
    if (box && large()) closer(box);
    else if (feature !== null) location.hash = `#feature=${feature}`;
    box = null;
    drawBox();
    point(null);
  });
  map.addEventListener("pointerleave", () => { box = null; drawBox(); point(null); });
  byId("whole").addEventListener("click", () => { frame = WHOLE; byId("whole").hidden = true; drawMap(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  new ResizeObserver(drawMap).observe(map);
}
