// What a reader would see go wrong on the page, measured: a list of sentences, empty where all is well.
() => {
  const faults = [], root = document.documentElement;
  const name = e => {
    const text = (e.getAttribute?.("aria-label") || e.textContent || "").trim().replace(/\s+/g, " ").slice(0, 60);
    const kind = e.classList?.length ? `.${[...e.classList].join(".")}` : "";
    return `<${e.tagName.toLowerCase()}${kind}> "${text}"`;
  };
  const visible = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true});
  const outside = (inner, outer) => Math.max(
    outer.left - inner.left, inner.right - outer.right, outer.top - inner.top, inner.bottom - outer.bottom);
  const scrolls = style => /auto|scroll/.test(style.overflowX + style.overflowY);
  const hides = style => /hidden|clip/.test(style.overflowX + style.overflowY);
  const SLACK = 1.5;  // px, of rounding

  if (root.scrollWidth > root.clientWidth) {
    const wide = [...document.body.querySelectorAll("*")].filter(
      e => visible(e) && e.getBoundingClientRect().right > root.clientWidth + SLACK).map(name);
    faults.push(`the page is ${root.scrollWidth} px wide in a window of ${root.clientWidth}: ${wide.slice(-3).join("; ")}`);
  }

  // Lines of text, each with the boxes that it has to lie in.
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const around = node.parentElement;
    if (!node.data.trim() || !visible(around) || around.closest("script, style, title, option, svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = [...range.getClientRects()].filter(line => line.width > 0);
    for (let e = around; e && e !== document.body; e = e.parentElement) {
      const style = getComputedStyle(e), box = e.getBoundingClientRect();
      if (box.width <= 1 || box.height <= 1) break;  // for screen readers only
      if (style.position === "fixed" || scrolls(style)) break;  // what is inside can be scrolled to
      const framed = parseFloat(style.borderRightWidth) > 0 && parseFloat(style.borderLeftWidth) > 0;
      const over = Math.max(0, ...lines.map(line => outside(line, box)));
      if ((framed || hides(style)) && over > SLACK) {
        faults.push(`${over.toFixed(0)} px of "${node.data.trim().slice(0, 60)}" are outside ${name(e)}`);
        break;
      }
      if (style.display.startsWith("inline")) continue;
    }
  }

  for (const e of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(e);
    if (!visible(e) || !scrolls(style) || e === document.scrollingElement) continue;
    const over = Math.max(e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight);
    if (over <= 1) continue;
    const labelled = e.getAttribute("aria-label") || e.getAttribute("aria-labelledby");
    const within = e.querySelector("a[href], button, input, [tabindex='0']");
    if (e.tabIndex < 0 && !within) faults.push(`${name(e)} scrolls, and no key reaches it`);
    else if (e.tabIndex >= 0 && e.tagName !== "CODE" && (!labelled || !e.getAttribute("role")))
      faults.push(`${name(e)} scrolls, and has no label and role`);
  }

  for (const svg of document.querySelectorAll("svg[role=img], svg[aria-label]")) {
    if (!visible(svg)) continue;
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(visible).map(text => [text, text.getBoundingClientRect()]);
    texts.forEach(([text, own], i) => {
      const over = outside(own, box);
      if (over > SLACK) faults.push(`${over.toFixed(0)} px of "${text.textContent.trim()}" are outside ${name(svg)}`);
      const scale = own.height && Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b) * parseFloat(getComputedStyle(text).fontSize);
      if (scale < 8.5) faults.push(`"${text.textContent.trim()}" is ${scale.toFixed(1)} px high in ${name(svg)}`);
      for (const [other, its] of texts.slice(i + 1)) {
        const wide = Math.min(own.right, its.right) - Math.max(own.left, its.left);
        const high = Math.min(own.bottom, its.bottom) - Math.max(own.top, its.top);
        if (wide > SLACK && high > 0.4 * Math.min(own.height, its.height))
          faults.push(`"${text.textContent.trim()}" and "${other.textContent.trim()}" overlap in ${name(svg)}`);
      }
    });
  }

  // Nodes have to stand out from the card by fill or rim, as WCAG 1.4.11 asks of graphics, and to be large enough.
  const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const luminance = colour => {
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(
      v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const behind = e => {
    const colour = getComputedStyle(e).backgroundColor;
    return /^rgba\(.*, 0\)$|^transparent$/.test(colour) && e.parentElement ? behind(e.parentElement) : colour;
  };
  for (const tree of document.querySelectorAll(".tree")) {
    if (!visible(tree)) continue;
    const card = behind(tree), pale = [], tiny = [];
    for (const node of tree.querySelectorAll("circle")) {
      const {fill, stroke} = getComputedStyle(node);
      if (Math.max(contrast(fill, card), stroke === "none" ? 0 : contrast(stroke, card)) < 3) pale.push(node);
      if (node.getBoundingClientRect().width < 2.5) tiny.push(node);
    }
    if (pale.length) faults.push(`${pale.length} nodes of the tree are paler than 3 : 1`);
    if (tiny.length) faults.push(`${tiny.length} nodes of the tree are less than 2.5 px wide`);
  }

  for (const image of document.images) {
    if (!visible(image)) continue;
    const box = image.getBoundingClientRect(), crisp = getComputedStyle(image).imageRendering === "pixelated";
    if (!image.complete || !image.naturalWidth) faults.push(`${name(image)} did not load`);
    if (!image.alt.trim()) faults.push(`a picture of ${image.naturalWidth} px has no alt text`);
    const small = Math.min(image.naturalWidth, image.naturalHeight) <= 64;
    if (small && !crisp && Math.abs(box.width - image.naturalWidth) > 1)
      faults.push(`"${image.alt}", of ${image.naturalWidth} px, is blurred to ${box.width.toFixed(0)}`);
    if (crisp && box.width < 0.95 * image.naturalWidth)
      faults.push(`"${image.alt}", of ${image.naturalWidth} px, loses pixels at ${box.width.toFixed(0)}`);
  }
  return faults;
}
