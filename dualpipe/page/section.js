/* One section of the page: its timelines with one view, the toolbar, the stories beside them. */

const READABLE = 52; // pixels for one unit of compute, so that the names of ops can be read

function makeSection(node) {
  const data = JSON.parse(node.querySelector("script.data").textContent);
  const schedules = data.drawings.map(readSchedule);
  schedules.forEach(layOut);
  if (!schedules.length) return null;
  const view = makeView(Math.max(...schedules.map((one) => one.end), 1e-6), 3 * schedules[0].unit);
  const timelines = schedules.map((schedule) => makeTimeline(schedule, view, labelOf(data.name, schedule)));
  const section = { node, data, view, timelines, example: data.counterexamples.length ? 0 : null, shown: true };
  const after = timelines[timelines.length - 1];

  section.showExample = () => {
    const example = data.counterexamples[section.example];
    after.focused = null;
    after.mark(section.shown && example ? example.marks : []);
  };
  section.aim = () => aim(section, after);
  const figures = timelines.map((timeline, index) => figureOf(schedules[index], timeline, view));
  const stage = element("div", { class: "stage" }, toolbarOf(section, schedules), ...figures, hint(), ...schedules.map(programOf));
  node.querySelector(".board").append(stage);
  const stories = node.querySelector(".stories");
  if (stories) fillStories(stories, section, after);
  section.showExample();
  timelines.forEach((timeline) => timeline.resize());
  if (section.example !== null) section.aim();
  return section;
}

function labelOf(name, schedule) {
  const end = schedule.stuck === null ? `ends at ${number(schedule.line)}` : `stuck at ${number(schedule.stuck)}`;
  return `Timeline of ${name}${schedule.title && ` ${schedule.title}`}: ${schedule.ranks.length} ranks, ${schedule.ops.length} ops, ${end}. Arrow keys walk the ops.`;
}

function figureOf(schedule, timeline, view) {
  const caption = schedule.caption ? [element("figcaption", {}, schedule.caption)] : [];
  return element("figure", { class: "timeline" }, ...caption, timeline.node, ...memoryOf(schedule, view));
}

/* Zoom to the marks of the counterexample, close enough to read. */
function aim({ view }, { scene, marks }) {
  const ops = marks.flatMap((mark) => [...mark.at, ...mark.to]).map((index) => scene.schedule.ops[index]);
  if (!ops.length) return view.fit();
  const [from, to] = [Math.min(...ops.map((op) => op.x0)), Math.max(...ops.map((op) => op.x1))];
  const width = Math.max(1.3 * (to - from), ((scene.width - GUTTER) / READABLE) * scene.schedule.unit);
  return view.show((from + to - width) / 2, (from + to + width) / 2);
}

function button(text, label, action) {
  const made = element("button", { type: "button", "aria-label": label, title: label }, text);
  made.addEventListener("click", () => action(made));
  return made;
}

function toolbarOf(section, schedules) {
  const { view } = section;
  const pan = (share) => () => view.pan(share * (view.to - view.from));
  const buttons = [
    button("−", "Zoom out", () => view.zoom(1 / 1.5)),
    button("+", "Zoom in", () => view.zoom(1.5)),
    button("Fit", "Show everything", () => view.fit()),
    button("←", "Earlier", pan(-0.25)),
    button("→", "Later", pan(0.25)),
  ];
  const groups = [element("div", { class: "buttons" }, ...buttons)];
  if (section.data.counterexamples.some((example) => example.marks.length)) {
    const toggle = button("Counterexample", "Show or hide the counterexample", () => {
      section.shown = !section.shown;
      toggle.setAttribute("aria-pressed", section.shown);
      section.showExample();
    });
    toggle.setAttribute("aria-pressed", "true");
    groups.push(element("div", { class: "buttons" }, toggle));
  }
  const bar = element("div", { role: "toolbar", "aria-label": "View of the timeline", class: "toolbar" }, ...groups);
  bar.append(legend(schedules, section.data.counterexamples.length > 0));
  return bar;
}

/* The words and colours of the legend in pictures, and those of what only a page shows. */
function legend(schedules, hasExamples) {
  const entry = (text, ...kinds) => element("li", {}, ...kinds.map((kind) => element("span", { class: `swatch ${kind}` })), text);
  const entries = [...new Map(schedules.map(({ names }) => [names.join(), names])).values()].flatMap(shadesOf);
  entries.push(entry("bubble", "bubble"), entry("send", "send", "send gradient"), entry("receive", "receive", "receive gradient"));
  if (schedules.some(({ ranks }) => ranks.flat().some((slot) => slot.changed))) entries.push(entry("changed", "changed"));
  if (schedules.some(({ stuck }) => stuck !== null)) entries.push(entry("not reached", "unreached"));
  if (hasExamples) entries.push(entry("counterexample", "fault"));
  return element("ul", { class: "legend", "aria-label": "Legend" }, ...entries);
}

/* For each kind the shades of its tones; the first one names the tones. */
function shadesOf(names) {
  const which = names.length > 1 ? `: ${names.join(", ")}` : "";
  return ["forward", "backward", "weights"].map((kind, index) => {
    const swatches = names.map((_, tone) => {
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = `var(--${kind[0]}-${tone + 1}-of-${names.length})`;
      return swatch;
    });
    return element("li", {}, ...swatches, index ? kind : `${kind}${which}`);
  });
}

function hint() {
  const words = "Drag to pan. Ctrl and wheel, or a pinch, zooms; so does the wheel alone after a click. Arrow keys walk the ops, ";
  const keys = [
    [element("kbd", {}, "n"), " goes to what one needs, "],
    [element("kbd", {}, "m"), " to the message's other end, "],
    [element("kbd", {}, "+"), element("kbd", {}, "−"), element("kbd", {}, "0"), " zoom."],
  ];
  return element("p", { class: "hint" }, words, ...keys.flat());
}

/* The schedule in its text form, for reading, searching and copying. */
function programOf(schedule) {
  const text = element("pre", { class: "program" });
  const title = `Schedule text${schedule.title && `, ${schedule.title}`}`;
  const details = element("details", { class: "programs" }, element("summary", {}, title), text);
  details.addEventListener("toggle", () => {
    text.textContent ||= schedule.ranks
      .map((slots, rank) => `rank ${rank}: ${slots.map((slot) => slot.ops.map((op) => op.text).join("+")).join(" ")}`)
      .join("\n");
  });
  return details;
}

function fillStories(aside, section, after) {
  const { counterexamples } = section.data;
  const panel = `${section.node.id}-story`;
  const body = element("div", { class: "story", role: "tabpanel", id: panel, "aria-label": "Story" });
  const tabs = counterexamples.map((example, index) => {
    const tab = element("button", { type: "button", role: "tab", "aria-controls": panel }, example.title);
    tab.addEventListener("click", () => choose(index, true));
    return tab;
  });
  const list = element("div", { class: "tabs", role: "tablist", "aria-label": "Refuted checks" }, ...tabs);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose((section.example + step + tabs.length) % tabs.length, true);
    tabs[section.example].focus();
  });
  const choose = (index, asked) => {
    section.example = index;
    tabs.forEach((tab, other) => {
      tab.setAttribute("aria-selected", other === index);
      tab.tabIndex = other === index ? 0 : -1;
    });
    body.replaceChildren(...storyOf(section, after, counterexamples[index]));
    section.showExample();
    if (asked) section.aim();
  };
  choose(section.example, false);
  const heading = element("h3", {}, counterexamples.length > 1 ? "Why it is refuted, check by check" : "Why it is refuted");
  aside.replaceChildren(heading, list, body);
}

/* The steps that the timeline numbers, and the lines of the story that they leave out. */
function storyOf(section, after, { story, marks }) {
  const sentences = marks.map((mark) => mark.sentence);
  const rest = story.split("\n").filter((text) => !sentences.some((sentence) => sentence.includes(text)));
  const steps = marks.map((mark, index) => stepOf(section, after, mark, index));
  const covered = sentences.length && sentences.join("\n").includes(story) ? [] : rest;
  const list = steps.length ? [element("ol", {}, ...steps)] : [];
  return [...list, ...covered.map((text) => element("p", {}, text))];
}

function stepOf(section, after, mark, index) {
  const number = element("span", { class: "step", "aria-hidden": "true" }, String(index + 1));
  const step = button("", mark.sentence, () => {
    const op = after.scene.schedule.ops[mark.at[0]];
    if (!section.shown) return;
    section.view.reveal(op.x0, op.x1);
    after.node.scrollIntoView({ block: "nearest" });
  });
  step.removeAttribute("title");
  step.append(number, element("span", {}, mark.sentence));
  const focus = (value) => () => {
    after.focused = value;
    after.refresh();
  };
  ["pointerenter", "focus"].forEach((event) => step.addEventListener(event, focus(index)));
  ["pointerleave", "blur"].forEach((event) => step.addEventListener(event, focus(null)));
  return element("li", {}, step);
}
