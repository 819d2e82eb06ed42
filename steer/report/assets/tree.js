// Search trees that pan, zoom and show the node under the pointer. Without it every node still has its facts as a
// tooltip. Positions are those of tree.html.j2; data-p is the position of a node's parent, data-i its thumbnail's cell.
"use strict";

for (const box of document.querySelectorAll(".tree")) {
  const svg = box.querySelector("svg"), panel = box.querySelector(".node"), trail = svg.querySelector(".trail");
  const sheet = box.querySelector("img[data-side]"), side = sheet ? +sheet.dataset.side : 0;
  const full = svg.getAttribute("viewBox").split(" ").map(Number);
  const nodes = [...svg.querySelectorAll("circle")].map((dot, i) => {
    const title = dot.querySelector("title"), facts = title.textContent.split("\n");
    title.remove();
    return {i, dot, facts, x: +dot.getAttribute("cx"), y: +dot.getAttribute("cy"),
      up: "p" in dot.dataset ? +dot.dataset.p : -1, cell: "i" in dot.dataset ? +dot.dataset.i : -1};
  });
  const children = nodes.map(() => []);
  nodes.forEach(n => n.up >= 0 && children[n.up].push(n.i));
  let view = [...full], drag = null, pinned = false, at = -1;

  const make = (tag, text) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const head = make("b"), facts = make("dl"), keys = make("div");
  const canvas = make("canvas");
  canvas.width = canvas.height = side || 1;
  panel.append(...(sheet ? [canvas] : []), head, facts, keys);
  const moves = box.previousElementSibling?.querySelector(".moves");
  if (moves) moves.hidden = false;

  const show = i => {
    if (at >= 0) nodes[at].dot.classList.remove("at");
    at = i;
    const n = nodes[i];
    n.dot.classList.add("at");
    const leaf = n.dot.classList.contains("on") ? "best leaf" : "leaf";
    head.textContent = n.up < 0 ? "root" : children[i].length ? "node" : leaf;
    facts.replaceChildren(...n.facts.flatMap(line => {
      const cut = line.indexOf(": ");
      return [make("dt", line.slice(0, cut)), make("dd", line.slice(cut + 2))];
    }));
    if (sheet) {
      const pen = canvas.getContext("2d"), wide = sheet.naturalWidth / side;
      canvas.hidden = n.cell < 0;
      pen.imageSmoothingEnabled = false;
      const corner = [n.cell % wide * side, Math.floor(n.cell / wide) * side];
      if (n.cell >= 0) pen.drawImage(sheet, ...corner, side, side, 0, 0, side, side);
    }
  };
  const pin = i => {
    pinned = i >= 0;
    let line = "";
    for (let n = nodes[i]; n && n.up >= 0; n = nodes[n.up]) {
      const p = nodes[n.up], m = (p.y + n.y) / 2;
      line += `M${p.x} ${p.y}C${p.x} ${m} ${n.x} ${m} ${n.x} ${n.y}`;
    }
    trail.setAttribute("d", line);
    if (i >= 0) show(i);
  };
  const look = () => svg.setAttribute("viewBox", view.map(v => v.toFixed(2)).join(" "));
  const point = event => {
    const to = svg.getScreenCTM().inverse();
    return [event.clientX * to.a + to.e, event.clientY * to.d + to.f, to.a];
  };
  const nearest = event => {
    const [x, y, scale] = point(event);
    let best = -1, near = 16 * scale;
    for (const n of nodes) {
      const far = Math.hypot(n.x - x, n.y - y);
      if (far < near) [best, near] = [n.i, far];
    }
    return best;
  };
  const zoom = (factor, x = view[0] + view[2] / 2, y = view[1] + view[3] / 2) => {
    const wide = Math.min(full[2], Math.max(full[2] / 60, view[2] * factor)), f = wide / view[2];
    view = [x - (x - view[0]) * f, y - (y - view[1]) * f, wide, view[3] * f];
    view[0] = Math.min(Math.max(view[0], 0), full[2] - view[2]);
    view[1] = Math.min(Math.max(view[1], 0), full[3] - view[3]);
    svg.style.touchAction = wide < full[2] ? "none" : "";
    look();
  };
  for (const [text, name, act] of [["+", "zoom in", () => zoom(.6)], ["\u2212", "zoom out", () => zoom(1 / .6)],
      ["all", "show all", () => zoom(1e9)], ["best", "the best leaf", () => pin(best())]]) {
    const button = make("button", text);
    button.type = "button";
    button.title = name;
    button.addEventListener("click", act);
    keys.append(button);
  }
  const best = () => nodes.findLast(n => n.dot.classList.contains("on")).i;
  svg.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const [x, y] = point(event);
    zoom(Math.exp(event.deltaY / 300), x, y);
  }, {passive: false});
  svg.addEventListener("pointerdown", event => { drag = {from: point(event), moved: 0}; });
  svg.addEventListener("pointermove", event => {
    if (drag && event.buttons) {
      const [x, y, scale] = point(event);
      drag.moved += Math.abs(event.movementX) + Math.abs(event.movementY);
      if (drag.moved > 4 && view[2] < full[2]) {
        svg.setPointerCapture(event.pointerId);
        view[0] += drag.from[0] - x;
        view[1] += drag.from[1] - y;
        zoom(1);
      }
    } else if (!pinned) {
      const i = nearest(event);
      if (i >= 0) show(i);
    }
  });
  svg.addEventListener("pointerup", event => {
    if (drag && drag.moved <= 4) pin(nearest(event));
    drag = null;
  });
  svg.addEventListener("keydown", event => {
    const n = nodes[at], row = n.up >= 0 ? children[n.up] : [at], i = row.indexOf(at);
    const go = {ArrowUp: n.up, ArrowDown: children[at][0], ArrowLeft: row[i - 1], ArrowRight: row[i + 1]}[event.key];
    if (event.key === "Escape") pin(-1);
    else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? .6 : 1 / .6, n.x, n.y);
    else if (go >= 0) {
      event.preventDefault();
      pin(go);
      nodes[go].dot.scrollIntoView({block: "nearest", inline: "nearest"});
    }
  });
  if (sheet && !sheet.complete) sheet.addEventListener("load", () => show(at));
  show(best());
}
