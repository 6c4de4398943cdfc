/** Numbers as people read them. Pure. */

/** 0.0004 is "0.4 ms", 0.25 is "250 ms", 12.34 is "12.3 s". */
export function duration(seconds) {
  const ms = seconds * 1000;
  if (ms >= 9999.5) return `${seconds.toFixed(1)} s`;
  return `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** 1234567 is "1,234,567"; what is no number stays as it is. */
export function grouped(value) {
  return typeof value === "number" ? value.toLocaleString("en-US", { maximumFractionDigits: 3 }) : String(value);
}

/** "1 token", "2 tokens". */
export function counted(count, noun, several = `${noun}s`) {
  return `${grouped(count)} ${count === 1 ? noun : several}`;
}
