// Numbers as people read them. Sizes count in 1000s, as the rest of mlx-flash does.

const SCALES = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "KB"], [1, "B"]];

export function digits(value, significant = 3) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  const places = Math.min(Math.max(significant - 1 - size, 0), 3);
  return value.toLocaleString("en", {
    minimumFractionDigits: places, maximumFractionDigits: places,
  });
}

export function bytes(value) {
  const [scale, unit] = SCALES.find(([least]) => value >= least) ?? [1, "B"];
  return `${digits(value / scale)} ${unit}`;
}

export function seconds(value) {
  return value < 1 ? `${digits(value * 1000)} ms` : `${digits(value)} s`;
}

export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

export function count(value) {
  return value.toLocaleString("en");
}

export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}
