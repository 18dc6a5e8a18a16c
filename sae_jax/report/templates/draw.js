const touch = matchMedia("(pointer: coarse)").matches;

// plotly takes colours, not CSS variables: read them anew whenever the scheme changes
function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const [paper, ink, quiet, rule] = ["--paper", "--ink", "--quiet", "--rule"].map((name) => style.getPropertyValue(name).trim());
  const axis = (given) => ({gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true, ...given, title: {standoff: 12, ...given.title}});
  return {
    margin: {l: 8, r: 8, t: 32, b: 8},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: ink},
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: {size: 11}},
    dragmode: touch ? false : "zoom",
    showlegend: false,
    ...layout,
    font: {family: "system-ui, sans-serif", color: ink},
    colorway: [ink],
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: {bgcolor: paper, bordercolor: rule, font: {color: ink}, align: "left"},
    xaxis: axis(layout.xaxis),
    yaxis: axis(layout.yaxis),
  };
}

function draw(id, data, layout) {
  // named one by one: among plotly's own choice is a button that sends the data away
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const config = {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: buttons};
  Plotly.react(id, data, themed(layout), config);
}
