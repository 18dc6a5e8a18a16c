"use strict";
// Data come as scripts, each a call of `arrived`: on file:// a page may load a script and nothing else.
const MOST_HELD = 16; // files of features
const held = new Map();

function arrived(name, value) {
  held.set(name, value);
}

function load(name) {
  if (held.has(name)) return Promise.resolve(held.get(name));
  const files = [...held.keys()].filter((each) => /^\d+$/.test(each));
  if (files.length >= MOST_HELD) held.delete(files[0]);
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => { script.remove(); resolve(held.get(name)); };
    script.onerror = () => reject(new Error(`data/${name}.js cannot be read: keep the files of this folder together.`));
    document.head.append(script);
  });
}

function byId(id) {
  return document.getElementById(id);
}

// children that are strings become text, never markup
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// three digits
function short(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1).replace("e+", "e");
  return size >= 100 ? count(Math.round(value)) : value.toPrecision(3);
}

function percent(share) {
  return `${short(100 * share)} %`;
}

function count(number) {
  return number.toLocaleString("en");
}
