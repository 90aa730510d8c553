"use strict";
(() => {
  // Theme: the system's, until the button is pressed; kept for the next page where the browser lets us.
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const store = (f) => { try { return f(localStorage); } catch { return null; } };
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => { button.textContent = dark() ? "Light" : "Dark"; button.ariaLabel = `Switch to ${button.textContent} theme`; };
  const kept = store((s) => s.getItem("gdnfuse-theme"));
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    store((s) => s.setItem("gdnfuse-theme", root.dataset.theme));
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();

  // Filters: what has none of the ticked kinds, or none of the ticked states, is hidden.
  for (const form of document.querySelectorAll("form.filters")) {
    const graph = form.closest(".graph"), rows = graph.querySelectorAll("tr[data-kind]");
    const ticked = (name) => new Set(Array.from(form.querySelectorAll(`[data-filter="${name}"]:checked`), (i) => i.value));
    const apply = () => {
      const kinds = ticked("kind"), states = ticked("status");
      for (const e of graph.querySelectorAll("[data-kind]")) {
        const has = (set, words) => words.split("|").some((w) => set.has(w));
        e.hidden = !(has(kinds, e.dataset.kind) && has(states, e.dataset.status));
      }
      for (const li of graph.querySelectorAll(".map li")) li.hidden = !li.querySelector("a:not([hidden])");
      const shown = Array.from(rows).filter((r) => !r.hidden).length;
      form.querySelector("output").textContent = `${shown} of ${rows.length} shown`;
    };
    form.addEventListener("change", apply);
    form.hidden = false;
    apply();
  }

  // A link into a closed drawing opens it, and so does printing.
  const open = () => { const e = location.hash && document.getElementById(location.hash.slice(1)); if (e) e.open = true; };
  addEventListener("hashchange", open);
  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
  open();
})();
