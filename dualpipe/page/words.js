/* An op in words, for the tooltip and for a screen reader. */

const MEANING = {
  F: (op) => `forward of microbatch ${op.mb} at stage ${op.stage}`,
  B: (op) => `backward for the input, microbatch ${op.mb} at stage ${op.stage}`,
  W: (op) => `weight gradient of microbatch ${op.mb} at stage ${op.stage}`,
  SF: (op) => `sends the activation of microbatch ${op.mb} from stage ${op.stage} to ${peer(op)}`,
  RF: (op) => `receives the activation of microbatch ${op.mb} for stage ${op.stage} from ${peer(op)}`,
  SB: (op) => `sends the gradient of microbatch ${op.mb} from stage ${op.stage} to ${peer(op)}`,
  RB: (op) => `receives the gradient of microbatch ${op.mb} for stage ${op.stage} from ${peer(op)}`,
  AA: (op) => `all-to-all for microbatch ${op.mb} at stage ${op.stage}, ${groupOf(op)}`,
  AR: (op) => `all-reduce at stage ${op.stage}, ${groupOf(op)}`,
  US: (op) => `unshards the weights of stage ${op.stage}, ${groupOf(op)}`,
  RS: (op) => `reshards the weights of stage ${op.stage}`,
  RG: (op) => `reduces the gradients of stage ${op.stage}, ${groupOf(op)}`,
};

const peer = (op) => (op.peer === null || op.peer === undefined ? "no rank" : `rank ${op.peer}`);
const groupOf = (op) => (op.peer === null || op.peer === undefined ? "no group" : `group ${op.peer}`);
const number = (time) => String(Math.round(time * 1000) / 1000);
const place = (op) => `rank ${op.slot.rank}, slot ${op.slot.number}`;

function when(op) {
  const { start, end, reached, waits } = op.slot;
  if (op.reason) return `stuck here: ${op.reason}`;
  if (!reached) return waits ? "the rank waits here" : "not reached";
  return end > start ? `time ${number(start)} to ${number(end)}` : `posted at time ${number(start)}`;
}

/* Lines of [class, text], the name of the op apart. */
function describe(op) {
  const lines = [
    ["", `${MEANING[op.kind](op)}, lane ${op.lane}`],
    ["where", place(op)],
    [op.slot.reached && !op.reason ? "where" : "fault", when(op)],
  ];
  if (op.slot.changed) lines.push(["changed", "this slot is changed"]);
  if (op.partner) {
    const wrong = isMismatched(op);
    lines.push([wrong ? "fault" : "where", `matched with ${op.partner.text} of ${place(op.partner)}${wrong ? ", which is not its partner" : ""}`]);
  }
  return lines;
}

function describeNeed(need) {
  return typeof need === "string" ? ["fault", `${need}, which no rank does`] : ["", `${need.text}: ${place(need)}`];
}

function sentence(op) {
  const needs = op.needs.map((need) => describeNeed(need)[1]).join("; ");
  const parts = describe(op).map(([, text]) => text);
  return `${op.text}: ${parts.join(". ")}. Needs ${needs || "nothing"}.`;
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function contents(op) {
  const lines = describe(op).map(([kind, text]) => element("p", { class: kind }, text));
  const needs = op.needs.map((need) => {
    const [kind, text] = describeNeed(need);
    return element("li", { class: kind }, text);
  });
  const list = needs.length ? [element("p", {}, "needs"), element("ul", {}, ...needs)] : [element("p", {}, "needs nothing")];
  return [element("b", {}, op.text), ...lines, ...list];
}

/* The one tooltip of the page, beside a rectangle of the window. */
const tooltip = {
  show(op, box) {
    const tip = document.getElementById("tooltip");
    tip.replaceChildren(...contents(op));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, (box.left + box.right - width) / 2), innerWidth - width - 8);
    const below = box.bottom + 10;
    const top = below + height < innerHeight ? below : Math.max(8, box.top - height - 10);
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  },
  hide() {
    document.getElementById("tooltip").hidden = true;
  },
  announce(op) {
    document.getElementById("announcer").textContent = sentence(op);
  },
};
