// Draws the figures of a notebook: each is an element with its data as JSON.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll("div.figure")) {
    const { data, layout } = JSON.parse(place.querySelector("script").textContent);
    const drawn = document.createElement("div");
    place.replaceChildren(drawn);
    Plotly.newPlot(drawn, data, layout, { responsive: true, displaylogo: false });
  }
});
