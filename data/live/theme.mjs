// Light or dark: as the reader chose, else as the machine is set.
const dark = matchMedia('(prefers-color-scheme: dark)');

function remembered(value) {   // a browser may refuse to remember
  try {
    if (value) localStorage.setItem('clipprompt-theme', value);
    return localStorage.getItem('clipprompt-theme');
  } catch { return value ?? null; }
}

export function startTheme(button, changed = () => {}) {
  const root = document.documentElement;
  const set = name => {
    root.dataset.theme = name;
    changed();
  };
  const usual = () => dark.matches ? 'dark' : 'light';
  dark.addEventListener('change', () => remembered() ?? set(usual()));
  button.onclick = () => {
    const now = root.dataset.theme === 'dark' ? 'light' : 'dark';
    remembered(now);
    set(now);
  };
  set(remembered() ?? usual());
}
