/* Builds every section; follows the colour scheme; prints in light colours, with everything in view. */

const sections = [...document.querySelectorAll("section.comparison")].map(makeSection).filter(Boolean);
const timelines = sections.flatMap((section) => section.timelines);

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => timelines.forEach((timeline) => timeline.recolour()));
addEventListener("scroll", () => tooltip.hide(), { passive: true });

addEventListener("beforeprint", () => {
  document.documentElement.dataset.printing = "";
  sections.forEach((section) => section.view.fit());
  timelines.forEach((timeline) => timeline.recolour());
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.printing;
  timelines.forEach((timeline) => timeline.recolour());
});

window.schedulePage = { sections }; // for the browser's console and for tests
