// Whole contexts: tokens down, features across, the activation in each cell.
function opening(passage) {
  const words = passage.words?.slice(0, 12).map((number) => (number < 0 ? "" : visible(word(number)))).join("");
  return words === undefined ? `from row ${count(passage.rows[0] ?? 0)}` : cut(words);
}

function cell(whole, feature, name) {
  const made = element("td");
  if (whole <= 0) return made;
  const value = whole * 10 ** table.exponents[feature];
  made.textContent = short(value);
  made.title = `${name}, feature ${feature}: ${short(value)}`;
  shade(made, value / table.largest[feature]);
  return made;
}

function drawPassage(passages, chosen) {
  if (chosen >= passages.length) throw new Error(`There is no passage ${chosen}: the last is ${passages.length - 1}.`);
  const passage = passages[chosen];
  const options = passages.map((each, place) => element("option", {value: String(place), selected: place === chosen}, `${place + 1}. ${opening(each)}`));
  const choice = element("select", {onchange: (event) => { location.hash = `#passage=${event.target.value}`; }}, ...options);
  const heads = passage.features.map((feature) => element("th", {scope: "col"},
    element("a", {href: `#feature=${feature}`, title: labels.get(feature) ?? `feature ${feature}`}, String(feature)),
    ...(labels.has(feature) ? [element("small", {}, element("bdi", {}, cut(labels.get(feature))))] : [])));
  const rows = passage.values.map((values, place) => {
    const name = passage.words ? spelled(word(passage.words[place]) ?? "") : count(passage.rows[place]);
    return element("tr", {}, element("th", {scope: "row"}, element("bdi", {title: `row ${count(passage.rows[place])}`}, name)),
      ...values.map((whole, column) => cell(whole, passage.features[column], name)));
  });
  const kind = passage.words ? "token" : "row";
  byId("passages").replaceChildren(
    element("h2", {id: "h-passages", tabIndex: -1}, `${passage.words ? "Tokens" : "Rows"} × features`),
    element("p", {}, `The features that are strongest in a passage, ${kind} by ${kind}. A cell is as strong in colour as the activation is beside the feature's largest anywhere.`),
    element("label", {className: "choice"}, "Passage ", choice),
    passage.features.length ? element("div", {className: "scroll tall", tabIndex: 0, role: "region", "aria-label": "Activations"},
      element("table", {className: "cells"}, element("thead", {}, element("tr", {}, element("th", {scope: "col"}, kind), ...heads)), element("tbody", {}, ...rows)))
      : element("p", {className: "told"}, "No feature is active in this passage."));
}
