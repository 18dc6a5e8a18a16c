// One feature: its numbers, its histogram, what it reads and writes, and where it is active.
const AT_FIRST = 10; // of the strongest contexts
const QUARTERS = ["Top quarter", "Second quarter", "Third quarter", "Bottom quarter"];
let numbers = false; // on all tokens

function link(feature) {
  return element("a", {href: `#feature=${feature}`}, String(feature), labels.has(feature) ? element("bdi", {}, ` ${cut(labels.get(feature))}`) : "");
}

function section(id, heading, ...children) {
  return element("section", {"aria-labelledby": id}, element("h3", {id}, heading), ...children);
}

function headline(feature) {
  const told = [
    ["density", percent(density(feature))], ["mean", short(table.mean[feature])], ["largest", short(table.largest[feature])],
    ["decoder norm", short(table.norm[feature])],
    table.cosine && ["encoder-decoder cosine", short(table.cosine[feature])],
    table.again && ["stability across seeds", short(table.again[feature])],
  ];
  return element("dl", {className: "headline"}, ...told.filter(Boolean).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function histogram(counts) {
  const most = Math.max(...counts);
  const {edges} = table;
  const span = (bin) => (bin + 1 < edges.length ? `${short(edges[bin])} to ${short(edges[bin + 1])}` : `above ${short(edges[bin])}`);
  const bars = counts.map((each, bin) => element("i", {title: `${span(bin)}: ${count(each)}`, style: `height:${(100 * each / most).toFixed(2)}%`}, ""));
  const told = counts.map((each, bin) => (each ? `${span(bin)}: ${count(each)}` : "")).filter(Boolean).join("; ");
  const ticks = [0, 0.5, 1].map((share) => element("span", {}, short(edges[Math.round(share * (edges.length - 1))])));
  return section("h-histogram", "Activations",
    element("div", {className: "bars", role: "img", "aria-label": `Histogram of activations. ${told}`}, ...bars),
    element("div", {className: "ticks"}, ...ticks),
    element("p", {}, `On how many ${table.peaks ? "tokens" : "rows"} it is active, ${count(most)} in the highest bar; each bar is as wide on a log scale as the next.`));
}

function logits(pairs, sign) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-30);
  return element("ol", {className: `logits ${sign}`}, ...pairs.map(([number, value]) => {
    const made = element("li", {}, element("bdi", {title: visible(word(number))}, spelled(word(number))), element("span", {}, short(value)));
    made.style.setProperty("--share", (Math.abs(value) / most).toFixed(3));
    return made;
  }));
}

function others(id, heading, pairs, value) {
  if (pairs.length === 0) return section(id, heading, element("p", {}, "None."));
  return section(id, heading, element("table", {className: "others"},
    element("thead", {}, element("tr", {}, element("th", {scope: "col"}, "feature"), element("th", {scope: "col"}, value))),
    element("tbody", {}, ...pairs.map(([feature, each]) => element("tr", {}, element("td", {}, link(feature)), element("td", {}, each === null ? "–" : each.toFixed(2)))))));
}

// its peak is a button that shows the numbers; so does a press on the text
function contextOf(examples, place, before, feature) {
  const unit = 10 ** table.exponents[feature];
  const [row, values] = [examples.rows[place], examples.values[place]];
  const press = element("button", {type: "button", "aria-expanded": "false", title: `Row ${count(row)}: show the numbers`}, short(values[before] * unit));
  const line = textOf({row, values, words: examples.words?.[place]}, before, table.largest[feature], unit);
  const made = element("li", {className: "context"}, press, line);
  made.addEventListener("click", () => {
    if (!getSelection().isCollapsed) return;
    press.setAttribute("aria-expanded", String(made.classList.toggle("numbers")));
  });
  return made;
}

function listOf(examples, places, before, feature) {
  return element("ol", {className: "contexts"}, ...places.map((place) => contextOf(examples, place, before, feature)));
}

function strongest(examples, feature) {
  const {strongest: before} = table.before;
  const places = [...examples.rows.keys()];
  const rest = places.slice(AT_FIRST);
  const more = element("details", {}, element("summary", {}, `${rest.length} more`), listOf(examples, rest, before, feature));
  return section("h-strongest", "Strongest contexts", listOf(examples, places.slice(0, AT_FIRST), before, feature), ...(rest.length ? [more] : []));
}

function quarters(examples, feature) {
  const {chance: before} = table.before;
  const peak = (place) => examples.values[place][before];
  const places = [...examples.rows.keys()].sort((a, b) => peak(b) - peak(a));
  const told = element("p", {}, `A sample of ${count(places.length)} of those in which it is active, the stronger first.`);
  if (places.length < QUARTERS.length) return section("h-quarters", "Contexts drawn by chance", told, listOf(examples, places, before, feature));
  const end = (quarter) => Math.round(quarter * places.length / QUARTERS.length);
  const parts = QUARTERS.map((name, quarter) => [name, places.slice(end(quarter), end(quarter + 1))]).filter(([, some]) => some.length);
  return section("h-quarters", "Contexts drawn by chance", told,
    ...parts.flatMap(([name, some]) => [element("h4", {}, name), listOf(examples, some, before, feature)]));
}

function bearing(feature) {
  const place = order.indexOf(feature);
  const step = (to, text) => (to === undefined ? element("span", {}, text) : element("a", {href: `#feature=${to}`}, text));
  const told = place < 0 ? "outside of the filters" : `${count(place + 1)} of ${count(order.length)}`;
  return element("nav", {className: "bearing", "aria-label": "Features"}, element("a", {href: "#features"}, "All features"),
    step(order[place - 1], "← Before"), step(order[place + 1], "After →"), element("span", {}, told),
    element("button", {type: "button", id: "numbers", "aria-pressed": String(numbers), onclick: toggleNumbers}, "Numbers"));
}

function toggleNumbers() {
  numbers = !numbers;
  byId("feature").classList.toggle("numbers", numbers);
  byId("numbers").setAttribute("aria-pressed", String(numbers));
}

function drawFeature(feature, told) {
  const active = table.fired[feature] > 0;
  const kind = table.peaks ? "tokens" : "rows";
  const label = labels.get(feature);
  const heading = element("h2", {id: "h-feature", tabIndex: -1}, `Feature ${feature}`, ...(label ? [": ", element("bdi", {}, label)] : []));
  const aside = [
    active ? histogram(told.histogram) : "",
    told.promoted ? section("h-promoted", "Tokens promoted", logits(told.promoted, "up")) : "",
    told.suppressed ? section("h-suppressed", "Tokens suppressed", logits(told.suppressed, "down")) : "",
    others("h-near", "Nearest decoder rows", told.near, "cosine"),
    active ? others("h-together", "Fires with", told.together, "correlation") : "",
  ];
  const reading = active ? [strongest(told.strongest, feature), quarters(told.chance, feature)]
    : [element("p", {className: "told"}, `This feature was never active on the ${count(table.rows)} ${kind} seen, so it has no histogram and no contexts.`)];
  byId("feature").replaceChildren(bearing(feature), heading, headline(feature),
    element("div", {className: "beside"}, element("div", {className: "reading"}, ...reading), element("div", {className: "aside"}, ...aside)));
}
