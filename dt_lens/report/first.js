"use strict";
(function () {
  const root = document.documentElement;
  root.classList.add("js"); // what only a script can show again may be hidden
  try {
    const chosen = localStorage.getItem("dt-lens-colours");
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  } catch (error) {
    // A browser that keeps nothing for files follows the system.
  }
})();
