/** Elements without markup: whatever comes from a model or a user goes in as text. */

/**
 * An element.
 * @param {string} tag
 * @param {object} props properties and attributes by name, listeners as onclick and the like; absent where
 *   undefined, null or false.
 * @param {...(Node|string|null|undefined|false)} children left out where they are empty.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child || child === 0));
  return node;
}

/** The element of index.html with this id. */
export const byId = (id) => document.getElementById(id);

/** Places an element over its parent; all in percent of the parent's sides. */
export function place(node, { left, top, width, height }) {
  const sides = { left, top, width, height };
  for (const [side, value] of Object.entries(sides)) if (value !== undefined) node.style[side] = `${value}%`;
  return node;
}
