/* Builds every section; follows the colour scheme; prints in light colours, with everything in view. */

const PAPER = 1000; // the width in pixels at which a timeline is drawn to be scaled to the paper

const sections = [...document.querySelectorAll("section.comparison")].map(makeSection).filter(Boolean);
const timelines = sections.flatMap((section) => section.timelines);

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => timelines.forEach((timeline) => timeline.recolour()));
addEventListener("scroll", () => tooltip.hide(), { passive: true });

addEventListener("beforeprint", () => {
  document.documentElement.dataset.printing = "";
  sections.forEach((section) => section.view.fit());
  timelines.forEach((timeline) => {
    timeline.recolour();
    timeline.resize(PAPER, 2);
  });
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.printing;
  timelines.forEach((timeline) => {
    timeline.recolour();
    timeline.resize();
  });
});

window.schedulePage = { sections }; // for the browser's console and for tests
