// Not a module, so that it runs before the page is painted.
(() => {
  const root = document.documentElement;
  const KEY = "playground-theme";
  try {
    root.dataset.theme = localStorage.getItem(KEY) ?? "auto";
  } catch {
    root.dataset.theme = "auto"; // The browser keeps nothing.
  }
  addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = root.dataset.theme;
    select.addEventListener("change", () => {
      root.dataset.theme = select.value;
      try {
        localStorage.setItem(KEY, select.value);
      } catch {
        // It holds for this page only.
      }
    });
  });
})();
