/* Reads a drawing's JSON, described in drawing.py, into ops with their place, time, needs and partner. */

const OP = /^(\d+)(SF|RF|SB|RB|F|B|W|AA|AR|US|RS|RG)(\d*)([>{])(?:@(\d+))?$/;
const COLLECTIVES = new Set(["AA", "AR", "US", "RS", "RG"]); // drawn like messages, in the hue of weights
const isCompute = (op) => op.kind.length === 1;
const isSend = (op) => op.kind[0] === "S";

function readSchedule(drawing) {
  const ops = [];
  const ranks = drawing.programs.map((program, rank) => {
    let clock = 0;
    return (program ? program.split(" ") : []).map((text, number) => {
      const start = clock + drawing.times[rank][2 * number];
      const end = (clock = start + drawing.times[rank][2 * number + 1]);
      const slot = { rank, number, start, end, reached: number < drawing.reached[rank], changed: false };
      slot.waits = number === drawing.reached[rank];
      slot.ops = text.split("+").map((word) => readOp(word, slot, ops, drawing));
      return slot;
    });
  });
  drawing.changed.forEach((numbers, rank) => numbers.forEach((number) => (ranks[rank][number].changed = true)));
  joinNeeds(ops, drawing.needs);
  joinPartners(ops, drawing);
  const { title, caption, memory, names, stuck, line, costs } = drawing;
  return { title, caption, memory, names, ops, ranks, stuck, line, costs };
}

/* colour: the name of a custom property, from colours.py. */
function readOp(word, slot, ops, { tones, names }) {
  const [, stage, kind, mb, lane] = OP.exec(word);
  const op = { number: ops.length, text: word.replace("{", "<"), kind, stage: +stage, mb: +mb, slot };
  op.lane = lane === ">" ? ">" : "<";
  const shade = isCompute(op) ? `${tones[op.lane][op.stage] + 1}-of-${names.length}` : "line";
  const hue = COLLECTIVES.has(kind) ? "w" : kind[kind.length - 1].toLowerCase();
  op.colour = `${hue}-${shade}`;
  ops.push(op);
  return op;
}

/* needs: ops, or the text of an op that the schedule does not have. */
function joinNeeds(ops, needs) {
  const needed = ops.length ? needs.split(";") : [];
  ops.forEach((op, number) => {
    op.needs = needed[number]
      .split(",")
      .filter(Boolean)
      .map((need) => (need[0] === "?" ? need.slice(1).replace("{", "<") : ops[number - need]));
  });
}

function joinPartners(ops, drawing) {
  ops.filter((op) => !isCompute(op)).forEach((op, index) => (op.peer = drawing.peers[index]));
  for (let index = 0; index < drawing.meets.length; index += 2) {
    const [send, receive] = [ops[drawing.meets[index]], ops[drawing.meets[index + 1]]];
    send.partner = receive;
    receive.partner = send;
  }
  drawing.waits.forEach(([number, reason]) => (ops[number].reason = reason));
}

/* Whether a message is matched with another one than it is meant for. */
function isMismatched(op) {
  if (!op.partner) return false;
  const [send, receive] = isSend(op) ? [op, op.partner] : [op.partner, op];
  return receive.needs.length > 0 && receive.needs[0] !== send;
}
