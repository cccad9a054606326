/* The counterexample over a timeline, as SVG: numbered arrows from an op that waits to the op that it waits for. */

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* Redraw the marks; `focused` is the number of the mark that the reader points at, or null. */
function drawArrows(svg, scene, marks, focused) {
  svg.replaceChildren(
    ...marks.map((_, index) => {
      const group = arrow(scene, marks, index);
      if (focused !== null && focused !== index) group.setAttribute("class", "faded");
      return group;
    }),
  );
}

function arrow(scene, marks, index) {
  const mark = marks[index];
  const { ops } = scene.schedule;
  const from = boxOf(scene, mark.at.map((number) => ops[number]));
  const to = target(scene, mark, from, ops);
  const shapes = to ? curve(from, to) : [];
  const badge = [shape("circle", { r: 9 }), shape("text", {}, String(index + 1))];
  const earlier = marks.slice(0, index).filter((other) => other.at[0] === mark.at[0]).length;
  const below = to && to.centre < from.centre;
  const at = `translate(${from.middle + 19 * earlier} ${below ? from.bottom + 8 : from.top - 6})`;
  return shape("g", { "data-mark": index }, ...shapes, shape("g", { transform: at }, ...badge));
}

/* The box that the arrow ends at: an op, or only the row of a rank that never gets there. */
function target(scene, mark, from, ops) {
  if (mark.to.length) return boxOf(scene, mark.to.map((number) => ops[number]));
  if (mark.peer === null) return null;
  const centre = scene.schedule.rowTop(mark.peer) + scene.schedule.sizes.compute / 2;
  return { left: from.middle, right: from.middle, middle: from.middle, centre };
}

function curve(from, to) {
  const down = to.centre > from.centre;
  const [x0, y0] = [from.middle, down ? from.bottom ?? from.centre : from.top ?? from.centre];
  const [x1, y1] = [to.middle, down ? to.top ?? to.centre : to.bottom ?? to.centre];
  const [width, height] = [x1 - x0, y1 - y0];
  const length = Math.hypot(width, height) || 1;
  const bow = Math.min(36, 0.22 * length); // so that two opposite arrows lie side by side
  const [bx, by] = [(x0 + x1) / 2 + (height / length) * bow, (y0 + y1) / 2 - (width / length) * bow];
  const angle = Math.atan2(y1 - by, x1 - bx);
  const wing = (turn) => `${x1 - 11 * Math.cos(angle + turn)} ${y1 - 11 * Math.sin(angle + turn)}`;
  const path = `M${x0} ${y0}Q${bx} ${by} ${x1 - 7 * Math.cos(angle)} ${y1 - 7 * Math.sin(angle)}`;
  return [
    shape("path", { class: "halo", d: path }),
    shape("path", { class: "shaft", d: path }),
    shape("path", { class: "head", d: `M${x1} ${y1}L${wing(0.42)}L${wing(-0.42)}Z` }),
  ];
}
