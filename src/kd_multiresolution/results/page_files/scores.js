// Scores and their places on the axis; words, numbers and elements.

const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images;
// Folders that all images share tell none apart.
while (images.every((image) => image.name.split("/").length > 2 && image.name.split("/")[0] === images[0].name.split("/")[0])) {
  for (const image of images) image.name = image.name.slice(image.name.indexOf("/") + 1);
}
const byId = (id) => document.getElementById(id);
const AT_ONCE = 60; // tiles
const STEPS = 1000; // of the slider
const BINS = 40;
const OUTCOMES = {
  false: "false alarm",
  miss: "miss",
  found: "found",
  passed: "passed",
  called: "called defective",
  uncalled: "called good",
};
const MANY = {
  false: "false alarms",
  miss: "misses",
  found: "defective, found",
  passed: "good, passed",
  called: "called defective",
  uncalled: "called good",
};

// As the post-processor normalises: 0.5 is its threshold, far from it scores approach 0 and 1.
const toPlace = (raw) => {
  if (!data.axis) return raw;
  const x = (2 * (raw - data.axis.middle)) / data.axis.span;
  return 0.5 + x / (1 + Math.abs(x)) / 2;
};
const toRaw = (place) => {
  if (!data.axis) return place;
  const x = 2 * place - 1;
  return data.axis.middle + ((data.axis.span / 2) * x) / (1 - Math.abs(x));
};

const places = images.map((image) => toPlace(image.raw));
const bounds = data.threshold === null ? places : [...places, toPlace(data.threshold)];
const [least, most] = bounds.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
const margin = (most - least || Math.abs(most) || 1) * 0.03;
const low = data.axis ? Math.max(least - margin, least / 2) : least - margin;
const high = data.axis ? Math.min(most + margin, (most + 1) / 2) : most + margin;

const goods = images.filter((image) => image.truth === false);
const defectives = images.filter((image) => image.truth === true);
const unknown = images.filter((image) => image.truth === null);
const highest = (some) => some.reduce((a, image) => Math.max(a, image.raw), -Infinity);
const start = data.threshold ?? highest(goods.length ? goods : images);
let threshold = start;

const outcomeOf = (image) => {
  const called = image.raw > threshold;
  if (image.truth === null) return called ? "called" : "uncalled";
  if (image.truth) return called ? "found" : "miss";
  return called ? "false" : "passed";
};

const number = (x, digits = 4) => {
  const text = Number(x.toPrecision(digits));
  return Math.abs(text) >= 1e-4 && Math.abs(text) < 1e6 ? String(text) : x === 0 ? "0" : x.toExponential(digits - 1);
};
const exact = (x) => String(Number(x.toPrecision(9)));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// Wilson's interval: it has a sensible end for 0 of 20, too.
const interval = (hits, count) => {
  const z = 1.96;
  const share = hits / count;
  const middle = (share + (z * z) / (2 * count)) / (1 + (z * z) / count);
  const half = (z / (1 + (z * z) / count)) * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
};

const element = (name, properties = {}, children = []) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const drawn = (name, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

// Round numbers within a range, about as many as asked for.
const ticks = (from, to, count) => {
  const rough = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let k = Math.ceil(from / step); k * step <= to + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
};
