"use strict";
const found = JSON.parse(document.getElementById("data").textContent);
const chosen = {text: 0, layer: 0, tree: 0, token: 0, leaf: null}; // leaf: one that was clicked in place of a token
const ROW = 24; // pixels of a leaf

const byId = (id) => document.getElementById(id);
const percent = (share) => (share >= 0.1 ? Math.round(100 * share) : (100 * share).toPrecision(2)) + " %";
const short = (value) => (value >= 10 ? String(Math.round(value)) : value.toPrecision(2));
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(Math.abs(value) < 1 ? 2 : 1);

/** A new element with properties, attributes (those with a dash, class and style variables) and children. */
function element(name, properties = {}, ...children) {
  const svg = ["svg", "path", "circle", "text", "rect", "line"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) made.style.setProperty(key, value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const fill = (id, ...children) => byId(id).replaceChildren(...children);
const layerNow = () => found.layers[chosen.layer];
const text = () => found.texts[chosen.text];
const routesIn = (layer) => text().layers[layer][Math.min(chosen.tree, found.layers[layer].shown_trees - 1)];
const routes = () => routesIn(chosen.layer);
const usageOf = (layer) => found.layers[layer].usage[Math.min(chosen.tree, found.layers[layer].shown_trees - 1)];
const leafNow = () => (chosen.leaf === null ? routes().leaves[chosen.token] : chosen.leaf);
const hue = (leaf, layer) => Math.round((330 * (leaf + 0.5)) / 2 ** layer.depth);

/** The nodes from the root to a leaf, each as "level:place". */
function pathTo(leaf, depth) {
  return Array.from({length: depth + 1}, (_, level) => `${level}:${leaf >> (depth - level)}`);
}

function choose(changes) {
  if (!("leaf" in changes)) changes.leaf = null;
  Object.assign(chosen, changes);
  chosen.tree = Math.min(chosen.tree, layerNow().shown_trees - 1);
  draw();
}

function choices(id, label, count, key, name) {
  if (count < 2) return fill(id);
  const buttons = Array.from({length: count}, (_, i) =>
    element("button", {type: "button", "aria-pressed": chosen[key] === i,
      onclick: () => choose(key === "text" ? {text: i, token: firstWord(i)} : {[key]: i, leaf: null})}, name(i)));
  fill(id, element("span", {}, label), ...buttons);
}

/** The token that is chosen at first: after the special token that texts begin with, if there is another. */
const firstWord = (i) => Math.min(1, found.texts[i].tokens.length - 1);

function drawTokens() {
  const {leaves, confidence} = routes();
  const buttons = text().tokens.map((token, i) => {
    const same = leaves[i] === leafNow() && (chosen.leaf !== null || i !== chosen.token);
    return element("button", {type: "button", class: same ? "tinted same" : "tinted", "--hue": hue(leaves[i], layerNow()),
      "aria-pressed": chosen.leaf === null && i === chosen.token, onclick: () => choose({token: i}),
      title: `leaf ${leaves[i]}, confidence ${confidence[i].toFixed(2)}`,
      onpointerenter: (event) => event.pointerType === "mouse" && preview(leaves[i]), onpointerleave: () => preview(null)},
    token, element("small", {}, String(leaves[i])));
  });
  fill("tokens", ...buttons);
}

function drawVerdict() {
  const {depth} = layerNow(), {leaves, confidence, logits} = routes(), i = chosen.token;
  byId("decisions").hidden = chosen.leaf !== null;
  if (chosen.leaf !== null) {
    const here = text().tokens.filter((_, t) => leaves[t] === chosen.leaf);
    fill("verdict", `Layer ${chosen.layer}, leaf ${chosen.leaf}: `, element("b", {}, String(here.length)),
      ` of the ${text().tokens.length} tokens of this text ${here.length === 1 ? "takes" : "take"} it.`);
    return;
  }
  fill("verdict", element("b", {}, text().tokens[i]), ` takes leaf `, element("b", {}, String(leaves[i])),
    ` of ${2 ** depth}${found.form === "leaf" ? "" : ` (node ${2 ** depth - 1 + leaves[i]})`} in layer ${chosen.layer}, confidence `, element("b", {}, confidence[i].toFixed(2)), ".");
  const least = Math.min(...logits[i].map(Math.abs)), name = found.form === "leaf" ? "router" : "node";
  fill("decisions", ...logits[i].map((logit, level) => {
    const number = 2 ** level - 1 + (leaves[i] >> (depth - level)); // breadth first, as the model's parameters
    return element("li", {class: Math.abs(logit) === least ? "least" : ""},
      `${name} ${number}: ${logit > 0 ? "right ↓" : "left ↑"} ${signed(logit)}`);
  }));
}

/** The leaves that the tree is drawn with: all of a small one, of a large one those that the text takes. */
function shownLeaves() {
  const all = 2 ** layerNow().depth;
  if (all <= 64) return Array.from({length: all}, (_, leaf) => leaf);
  return [...new Set([...routes().leaves, leafNow()])].sort((a, b) => a - b);
}

/** Where each node of the drawn tree lies: "level:place" -> {x, y, parent, share of the tokens or null}. */
function layOut(leaves, depth, step) {
  const nodes = new Map(), usage = usageOf(chosen.layer);
  leaves.forEach((leaf, row) => {
    const seen = usage && 2 ** depth <= 64 ? usage.leaves[leaf].count / usage.tokens : null;
    pathTo(leaf, depth).forEach((name, level, path) => {
      const node = nodes.get(name) || {x: 8 + level * step, rows: [], parent: path[level - 1], share: seen === null ? null : 0};
      node.rows.push(row);
      if (seen !== null) node.share += seen;
      nodes.set(name, node);
    });
  });
  for (const node of nodes.values()) node.y = ROW * (0.5 + (node.rows[0] + node.rows.at(-1)) / 2);
  return nodes;
}

function drawTree() {
  const layer = layerNow(), {depth} = layer, leaves = shownLeaves(), leaf = leafNow();
  const room = byId("tree").clientWidth, step = depth ? Math.max(9, Math.min(62, (room * (room < 480 ? 0.34 : 0.42) - 16) / depth)) : 20;
  const nodes = layOut(leaves, depth, step), on = new Set(pathTo(leaf, depth)), colour = hue(leaf, layer);
  const svg = byId("branches"), [paths, dots, labels] = [[], [], []];
  svg.setAttribute("width", depth * step + 16);
  svg.setAttribute("height", leaves.length * ROW);
  for (const [name, node] of nodes) {
    const here = {"data-node": name, class: on.has(name) ? "on" : "", "--hue": colour};
    if (node.parent) {
      const from = nodes.get(node.parent), middle = (from.x + node.x) / 2;
      const width = (node.share === null ? 1.2 : 0.6 + 9 * Math.sqrt(node.share)) + (on.has(name) ? 1.6 : 0);
      const line = element("path", {...here, "stroke-width": width.toFixed(1),
        d: `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${node.y} ${node.x} ${node.y}`});
      paths[on.has(name) ? "push" : "unshift"](line); // what is chosen lies on top
    }
    dots.push(element("circle", {...here, cx: node.x, cy: node.y, r: on.has(name) ? 5 : 2.5}));
    const level = Number(name.split(":")[0]);
    if (on.has(name) && chosen.leaf === null && level < depth && step >= 34) {
      const logit = routes().logits[chosen.token][level];
      labels.push(element("text", {x: node.x, y: node.y + (logit > 0 ? -9 : 18), "text-anchor": level ? "middle" : "start"},
        signed(logit)));
    }
  }
  svg.replaceChildren(...paths, ...dots, ...labels);
  byId("leaves").style.setProperty("--digits", String(2 ** depth - 1).length);
  fill("leaves", ...leaves.map(leafRow));
}

function leafRow(leaf) {
  const usage = usageOf(chosen.layer), about = usage && usage.leaves[leaf], layer = layerNow();
  const most = usage ? Math.max(...Object.values(usage.leaves).map((other) => other.count)) : 1;
  const words = about ? (about.typical.length ? about.typical : about.common).map(([token]) => token).join(" · ") : "";
  const bar = element("span", {class: "bar", "--hue": hue(leaf, layer)});
  bar.style.width = about ? `${(100 * about.count) / Math.max(1, most)}%` : "0";
  return element("button", {type: "button", "aria-pressed": leaf === leafNow(), "data-leaf": leaf, style: `height:${ROW}px`,
    "--hue": hue(leaf, layer), onclick: () => choose({leaf}),
    onpointerenter: (event) => event.pointerType === "mouse" && preview(leaf), onpointerleave: () => preview(null)},
  element("span", {class: "number"}, String(leaf)), bar,
  element("span", {class: "words"}, about && !about.count ? "nothing goes here" : words));
}

/** Show the way to a leaf without choosing it. */
function preview(leaf) {
  const nodes = new Set(leaf === null ? [] : pathTo(leaf, layerNow().depth));
  for (const part of byId("branches").querySelectorAll("[data-node]"))
    part.classList.toggle("preview", nodes.has(part.dataset.node) && !part.classList.contains("on"));
  for (const row of byId("leaves").children) row.classList.toggle("preview", Number(row.dataset.leaf) === leaf);
}

function tokenTable(caption, rows, tokens) {
  const head = element("tr", {}, ...["", "times here", "of its tokens"].map((name) => element("th", {scope: "col"}, name)));
  const body = rows.map(([token, here, everywhere]) => element("tr", {},
    ...[token, String(here), percent(here / everywhere)].map((cell) => element("td", {}, cell))));
  return element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
}

function drawLeaf() {
  const usage = usageOf(chosen.layer), leaf = leafNow(), about = usage && usage.leaves[leaf];
  fill("leaf-title", `What else goes to leaf ${leaf} of layer ${chosen.layer}`);
  if (!about) {
    fill("leaf-share", usage ? "This leaf was not counted." : "No text was given to count on (--train_file).");
    return fill("leaf-lists");
  }
  const equal = usage.tokens / 2 ** layerNow().depth;
  fill("leaf-share", `${about.count} of ${usage.tokens} tokens, ${percent(about.count / usage.tokens)}: ` +
    `${short(about.count / equal)} times an equal share.`);
  const lists = [["Most typical", about.typical], ["Most frequent", about.common]].filter(([, rows]) => rows.length);
  fill("leaf-lists", ...lists.map(([caption, rows]) => tokenTable(caption, rows, usage.tokens)));
}

function drawGrid() {
  const numbers = found.layers.map((_, layer) => layer);
  const head = element("tr", {}, element("th", {scope: "col"}, "layer"),
    ...numbers.map((layer) => element("th", {scope: "col"}, String(layer))));
  const rows = text().tokens.map((token, i) => element("tr", {}, element("th", {scope: "row"}, token),
    ...numbers.map((layer) => {
      const {leaves, confidence} = routesIn(layer);
      return element("td", {}, element("button", {type: "button", class: "tinted", "--hue": hue(leaves[i], found.layers[layer]),
        "--sure": 2 * confidence[i] - 1, "aria-pressed": chosen.leaf === null && i === chosen.token && layer === chosen.layer,
        title: `${token}, layer ${layer}: leaf ${leaves[i]}, confidence ${confidence[i].toFixed(2)}`,
        onclick: () => choose({layer, token: i})}, String(leaves[i])));
    })));
  fill("grid", element("thead", {}, head), element("tbody", {}, ...rows));
}

function drawUsage() {
  byId("usage").hidden = !found.layers.some((layer) => layer.usage.length);
  fill("usage-hint", `Counted on ${found.source}. The broken line is an equal share. Evenness is 2 to the ` +
    "power of the entropy: so many equally used leaves would spread the tokens as far.");
  fill("usage-charts", ...found.layers.flatMap((layer, number) => {
    const usage = usageOf(number), count = 2 ** layer.depth;
    if (!usage) return [];
    const caption = element("figcaption", {}, `Layer ${number}: ${usage.used} of ${count} leaves used, ` +
      `evenness ${usage.effective}`);
    if (count > 64) return [element("figure", {}, caption)];
    const shares = Object.values(usage.leaves).map((leaf) => leaf.count / usage.tokens);
    const top = Math.max(...shares, 2 / count), chart = element("svg", {viewBox: `0 0 ${count} 100`,
      preserveAspectRatio: "none", role: "img", "aria-label": `Shares of the leaves of layer ${number}`});
    shares.forEach((share, leaf) => chart.append(element("rect", {x: leaf + 0.1, width: 0.8, y: 100 * (1 - share / top),
      height: (100 * share) / top, "--hue": hue(leaf, layer)})));
    const level = 100 * (1 - 1 / count / top);
    chart.append(element("line", {x1: 0, x2: count, y1: level, y2: level}));
    return [element("figure", {}, caption, chart)];
  }));
}

function draw() {
  const focus = focusPath(), layer = layerNow();
  choices("texts", "Text", found.texts.length, "text", (i) => found.texts[i].text);
  choices("layers", "Layer", found.layers.length, "layer", String);
  choices("trees", "Tree", layer.shown_trees, "tree", String);
  for (const part of [drawTokens, drawVerdict, drawTree, drawLeaf, drawGrid]) part();
  fill("tree-hint", (2 ** layer.depth > 64 ? `Of ${2 ** layer.depth} leaves those that this text takes are drawn. ` : "") +
    (usageOf(chosen.layer) && 2 ** layer.depth <= 64 ? "Lines are as thick as the stream of tokens. " : "") +
    (usageOf(chosen.layer) ? "The words are the most typical of a leaf. " : "") +
    "Choose a leaf to see what else goes there.");
  restore(focus);
}

/** Drawing makes new elements: the keyboard's place is kept as section and number. */
function focusPath() {
  const holder = document.activeElement && document.activeElement.closest("[id]");
  return holder && [holder.id, [...holder.querySelectorAll("button")].indexOf(document.activeElement)];
}

function restore(focus) {
  const button = focus && focus[1] >= 0 && byId(focus[0]).querySelectorAll("button")[focus[1]];
  if (button) button.focus({preventScroll: true});
}

function summary() {
  const {neurons, neurons_per_token, depth, trees} = found.layers[0], leaves = 2 ** depth;
  const form = found.form === "leaf"
    ? `${trees === 1 ? "a tree" : `${trees} trees`} of ${leaves} leaves`
    : `${trees === 1 ? "a tree" : `${trees} trees`} of ${depth + 1} levels (each node on the way is a neuron)`;
  fill("summary", `${found.layers.length} layers, each ${form}: a token uses ${neurons_per_token} of ${neurons} neurons. `);
  fill("sentence-hint", "Choose a token to follow it. Its colour and number are its leaf in the layer chosen below; " +
    "tokens in a broken frame take the same leaf. " + (found.form === "leaf"
    ? "The confidence is that of its least certain decision (in blue), and scales what the leaf adds."
    : "The confidence is that of its least certain decision (in blue); in this form it scales nothing."));
}

chosen.token = firstWord(0);
summary();
drawUsage();
draw();
addEventListener("resize", drawTree);
