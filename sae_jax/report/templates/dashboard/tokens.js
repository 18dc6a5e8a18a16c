// How tokens are written: as text, with what has no shape of its own made visible.
const LONGEST_SHOWN = 40;
const SHAPELESS = /[\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]/g;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g;

function visible(word) {
  const text = word
    .replaceAll("\n", "⏎")
    .replaceAll("\t", "⇥")
    .replace(/[\0-\x1f]/g, (control) => String.fromCharCode(0x2400 + control.charCodeAt()))
    .replace(SHAPELESS, (character) => `⟨${character.charCodeAt().toString(16).padStart(4, "0")}⟩`);
  if (text === "") return "⟨empty⟩";
  return /^[\s⏎⇥]+$/.test(text) ? text.replace(/\s/g, "·") : text;
}

function cut(text) {
  const characters = [...text];
  return characters.length > LONGEST_SHOWN ? `${characters.slice(0, LONGEST_SHOWN).join("")}…` : text;
}

// alone, where spaces at its ends would be lost
function spelled(word) {
  return cut(visible(word).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)));
}

function word(number) {
  return held.get("words")[number];
}

function shade(made, share) {
  made.classList.add("on");
  made.style.setProperty("--share", share.toFixed(3));
}

// a window: words, or numbers of rows, each on the colour of its activation
function textOf(context, before, largest, unit) {
  const first = context.row - before;
  const text = context.words?.map((number) => (number < 0 ? "" : word(number))) ?? context.values.map((_, place) => String(first + place));
  const letters = text.join("");
  const backwards = (letters.match(RIGHT_TO_LEFT) ?? []).length > letters.length / 2;
  const line = element("p", {className: context.words ? "tokens" : "tokens rows", dir: backwards ? "rtl" : "ltr"});
  context.values.forEach((whole, place) => {
    if (whole < 0) return;
    const value = whole * unit;
    const said = visible(text[place]);
    // apart from each other, so that one that is written from right to left moves no other
    const made = element("bdi", {title: `${said}: ${short(value)}`}, cut(said));
    if (whole > 0) {
      shade(made, value / largest);
      made.dataset.value = short(value);
    }
    if (place === before) made.classList.add("peak");
    const blank = !/[^\s⏎⇥·]/.test(said);
    made.classList.toggle("blank", blank && whole === 0);
    line.append(made, context.words ? "" : " ", ...(blank ? [element("wbr")] : []));
  });
  return line;
}
