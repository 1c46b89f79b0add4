"""How pages look: one style sheet, light and dark, from 390 pixels on; and the scale of the heat maps.

The scale has one hue and steps of even lightness in OKLab (Ottosson 2020), pale to dark on light pages and the other way on dark
ones, so that more always stands out more.
"""

import math
from typing import NamedTuple

STEPS = 11  # colours of the scale
_HUE = math.radians(255)
_LIGHT = ((0.97, 0.012), (0.40, 0.130))  # lightness and chroma of the least and the most
_DARK = ((0.26, 0.020), (0.85, 0.095))


class Shade(NamedTuple):
    """A colour of the scale, and that of a text on it."""

    back: str
    text: str


def scale(dark: bool) -> list[Shade]:
    """The colours from least to most."""
    (low, pale), (high, full) = _DARK if dark else _LIGHT
    shades = []
    for i in range(STEPS):
        part = i / (STEPS - 1)
        rgb = _to_rgb(low + part * (high - low), pale + part * (full - pale))
        # The luminance of which black and white are equally far: 1.05 / (y + 0.05) = (y + 0.05) / 0.05.
        shades.append(Shade(_hex(rgb), "#000" if luminance(rgb) > 0.179 else "#fff"))
    return shades


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of sRGB values from 0 to 1, as contrast is defined with (WCAG 2)."""
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _to_rgb(lightness: float, chroma: float) -> tuple[float, float, float]:
    """OKLCH of the scale's hue to sRGB."""
    a, b = chroma * math.cos(_HUE), chroma * math.sin(_HUE)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (_gamma(min(1.0, max(0.0, value))) for value in linear)
    return red, green, blue


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def _shades(dark: bool) -> str:
    return "".join(f".h{i}{{background:{s.back};color:{s.text}}}" for i, s in enumerate(scale(dark)))


_COLOURS = """
:root{color-scheme:light dark;--page:#fff;--card:#f5f7fa;--line:#d5dbe3;--text:#18202b;--soft:#556070;--accent:#1d5fae;
--second:#a34a00;--good:#136c38;--bad:#b3152b;--on:#fff;
--edge:#1825363d}
"""
_NIGHT = """
:root{--page:#11151b;--card:#1a2029;--line:#343e4c;--text:#e6eaf0;--soft:#a3adbb;--accent:#7db4f5;--second:#f0a35e;
--good:#67cf90;--bad:#ff8a93;--on:#11151b;--edge:#7db4f533}
"""
_LAYOUT = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 8px;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:6px 0;max-width:80ch;overflow-wrap:anywhere}
.soft,figcaption small,.note{color:var(--soft)}
.note{font-size:.85rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:0;font-size:1.05rem;font-weight:600;line-height:1.35;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.tiles dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.verdict{border-radius:10px;padding:14px 18px;margin:16px 0;color:var(--on)}
.verdict strong{font-size:2rem;line-height:1.2;display:block}
.verdict p{margin:2px 0 0}
.verdict.good{background:var(--good)}
.verdict.bad{background:var(--bad)}
ul{padding-left:1.2em;margin:8px 0}
li{overflow-wrap:anywhere}
.checks{list-style:none;padding:0}
.good-mark{color:var(--good);font-weight:700}
.bad-mark{color:var(--bad);font-weight:700}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px;align-items:start}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}
figure{margin:0;min-width:0}
section>figure+figure{margin-top:28px}
figcaption{margin:0 0 6px;overflow-wrap:anywhere}
figcaption b{display:block}
figcaption small{display:block;font-size:.8rem;line-height:1.4}
.scroll{overflow-x:auto;max-width:100%;background:linear-gradient(90deg,var(--page) 40%,transparent) 0 0/40px 100% local no-repeat,
linear-gradient(270deg,var(--page) 40%,transparent) 100% 0/40px 100% local no-repeat,
linear-gradient(90deg,var(--edge),transparent) 0 0/14px 100% no-repeat,
linear-gradient(270deg,var(--edge),transparent) 100% 0/14px 100% no-repeat}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
.plain th,.plain td{padding:3px 10px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
.plain th:first-child,.plain td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:12em;max-width:28em}
.plain tbody th{font-weight:500}
.grid+.scroll{margin-top:18px}
.plain thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
.plain.words td{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.heat{font-size:.75rem;border-collapse:separate;border-spacing:1px}
.heat td{padding:3px 4px;text-align:center;min-width:2.9em;border-radius:2px;white-space:nowrap}
.heat td.none{color:var(--soft)}
.heat td.bad{background:var(--bad);color:var(--on);font-weight:700}
.heat td.own{outline:2px solid var(--second);outline-offset:-2px}
.heat tbody th{font-weight:400;position:sticky;left:0;background:var(--page);text-align:right;
padding:0 6px 0 0;max-width:10em;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}
.heat thead th{font-weight:400;vertical-align:bottom;height:1px;padding:0 0 4px}
.heat thead th span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:11em;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap;line-height:1.2}
.legend{display:flex;align-items:center;gap:6px;font-size:.75rem;color:var(--soft);margin:6px 0 0;flex-wrap:wrap}
.legend i{display:inline-block;width:14px;height:12px}
.legend span.ramp{display:inline-flex}
.key{display:inline-block;width:14px;height:3px;background:var(--accent);vertical-align:middle}
.key.dots{width:8px;height:8px;border-radius:4px;background:var(--second)}
.plot{display:grid;grid-template-columns:3.8em minmax(0,1fr);grid-template-rows:190px 1.5em;font-size:.75rem;color:var(--soft)}
.small .plot{grid-template-rows:130px 1.5em}
.plot .y,.plot .x{position:relative;font-variant-numeric:tabular-nums}
.plot .y span{position:absolute;right:6px;transform:translateY(-50%)}
.plot .x{grid-column:2;display:flex;justify-content:space-between;padding-top:2px}
.plot svg{width:100%;height:100%;display:block;background:var(--card);border-left:1px solid var(--line);
border-bottom:1px solid var(--line);overflow:visible}
svg *{vector-effect:non-scaling-stroke}
.curve{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round}
.band{fill:var(--accent);opacity:.2}
.rule{stroke:var(--line);stroke-width:1}
.plot.tall{grid-template-rows:340px 1.5em}
.field{position:relative}
.field svg{position:absolute;inset:0}
.mark{position:absolute;transform:translate(-50%,-50%);min-width:1.7em;padding:1px 3px;border-radius:1em;text-align:center;
  background:var(--second);color:var(--card);font-weight:600;line-height:1.35}
.dot{stroke:var(--second);stroke-width:8;stroke-linecap:round}
.frozen{fill:var(--accent)}
pre{font:12px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;margin:8px 0}
details{margin:8px 0}
summary{cursor:pointer;color:var(--accent);font-size:.85rem}
.answers{display:grid;gap:14px}
.answer{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.answer dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr));gap:10px;margin:0}
.answer dt{font-size:.8rem;color:var(--soft)}
.answer dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:40px;color:var(--soft);font-size:.8rem}
code{font:.9em ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
@media(max-width:480px){main{padding:14px 12px 40px}.heat{font-size:.7rem}.heat td{padding:3px 2px;min-width:2.7em}
.heat tbody th{max-width:12em}.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.verdict strong{font-size:1.7rem}}
"""

STYLE = f"{_COLOURS}{_shades(False)}{_LAYOUT}@media(prefers-color-scheme:dark){{{_NIGHT}{_shades(True)}}}"
