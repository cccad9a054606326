/* The memory of a schedule in a gallery, below its timeline: a line for each rank, on the same stretch of time. */

function memoryOf(schedule, view) {
  if (!schedule.memory) return [];
  const { levels, most, unit } = schedule.memory;
  const peaks = levels.map((steps) => Math.max(...steps.filter((_, index) => index % 2)));
  const label = `Memory, ${unit}: ${peaks.map((peak, rank) => `rank ${rank} up to ${number(peak)}`).join(", ")}`;
  const svg = shape("svg", { role: "img", "aria-label": label, preserveAspectRatio: "none" });
  levels.forEach((steps, rank) => svg.append(lineOf(steps, most, rank / Math.max(levels.length - 1, 1))));
  const follow = () => svg.setAttribute("viewBox", `${view.from} ${-0.04 * most} ${view.to - view.from} ${1.08 * most}`);
  view.onChange(follow);
  follow();
  return [element("div", { class: "memory" }, element("span", {}, `${unit}, to ${number(most)}`), svg)];
}

/* Steps in time; `place` from 0, the first rank, to 1 chooses hue and width, so that what is below shows at the edge. */
function lineOf(steps, most, place) {
  let path = `M${steps[0]} ${most - steps[1]}`;
  for (let index = 2; index < steps.length; index += 2) path += `H${steps[index]}V${most - steps[index + 1]}`;
  return shape("path", { d: path, stroke: `hsl(${270 - 210 * place} 65% 48%)`, "stroke-width": 3 - 2 * place });
}
