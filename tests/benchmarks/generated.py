"""Three tasks whose answers are said, not chosen, and that small models learn: conversations whose one right answer is known.

    python tests/benchmarks/generated.py DATA [--rows 1500] [--test 200]

Writes DATA/cl/{extract,tools,style}/{train,validation,test}.jsonl, and cl/gsm8k of DATA/abilities/gsm8k_*.jsonl. `extract` wants
an order as JSON, `tools` a call of one of eight functions, `style` a reply in a house's own form. No question is in two files.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = tuple(
    str.split(
        "Amara Bjorn Chen Dalia Emeka Farah Goran Hana Idris Jonas Kavya Lucia Mateo Nadia Omar Priya Quinn Rosa Sven Tariq"
    )
)
FAMILIES = tuple(
    str.split(
        "Adeyemi Berg Castro Dubois Eriksen Fischer Garcia Haddad Ivanova Jensen Kowalski Lopez Moreau Novak Okafor"
    )
)
THINGS = tuple(
    str.split(
        "kettles lamps chairs desks monitors keyboards blankets bicycles tents mugs notebooks speakers ladders drills"
    )
)
CITIES = tuple(
    str.split("Oslo Lagos Quito Hanoi Porto Turin Leeds Osaka Perth Dakar Lima Bergen Cusco Tampa Essen Nantes")
)
DAYS = tuple(str.split("Monday Tuesday Wednesday Thursday Friday Saturday"))
TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "get_weather": (("city", "day"), ("What is the weather in {city} on {day}?", "Will it rain on {day} in {city}?")),
    "book_table": (("city", "people", "day"), ("Get me a table for {people} in {city} this {day}.",
                                               "We are {people}, dinner in {city} on {day} please.")),
    "send_mail": (("name", "thing"), ("Write to {name} about the {thing}.", "Let {name} know that the {thing} are here.")),
    "set_alarm": (("hour", "day"), ("Wake me at {hour} on {day}.", "I need an alarm for {day}, {hour} o'clock.")),
    "find_route": (("start", "city"), ("How do I get from {start} to {city}?", "Show me the way to {city} from {start}.")),
    "order_item": (("people", "thing"), ("Buy {people} {thing}.", "We ran out of {thing}, order {people}.")),
    "add_contact": (("name", "family"), ("Save {name} {family} in my contacts.", "New contact: {name} {family}.")),
    "convert_price": (("price", "currency"), ("How much is {price} euros in {currency}?", "Change {price} euros into {currency}.")),
}  # fmt: skip


def extract(draw: random.Random) -> tuple[str, str]:
    """An order in words, and as JSON."""
    name, thing, city = f"{draw.choice(NAMES)} {draw.choice(FAMILIES)}", draw.choice(THINGS), draw.choice(CITIES)
    count, price = draw.randint(2, 60), draw.randint(5, 400)
    text = draw.choice([
        "{name} from {city} wants {count} {thing} at {price} euros each.",
        "Please send {count} {thing} to {city}. The price is {price} euros apiece, the bill goes to {name}.",
        "Order by {name}: {thing}, {count} pieces, {price} euros per piece, delivery to {city}.",
        "We agreed on {price} euros for each of the {count} {thing}. Ship them to {name}, {city}.",
    ])  # fmt: skip
    said = {"customer": name, "item": thing, "count": count, "price": price, "city": city}
    return "Extract the order as JSON: " + text.format(**(said | {"name": name, "thing": thing})), json.dumps(said)


def tools(draw: random.Random) -> tuple[str, str]:
    """A wish, and the call of a function that fulfils it."""
    known = {
        "city": draw.choice(CITIES), "start": draw.choice(CITIES), "day": draw.choice(DAYS), "people": draw.randint(2, 12),
        "name": draw.choice(NAMES), "family": draw.choice(FAMILIES), "thing": draw.choice(THINGS), "hour": draw.randint(4, 11),
        "price": draw.randint(5, 900), "currency": draw.choice(["dollars", "yen", "francs", "pounds"]),
    }  # fmt: skip
    tool = draw.choice(list(TOOLS))
    fields, ways = TOOLS[tool]
    call = {"name": tool, "arguments": {field: known[field] for field in fields}}
    return draw.choice(ways).format(**known), f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def style(draw: random.Random) -> tuple[str, str]:
    """A customer's note, and the reply that a house gives to it."""
    name, thing, day, number = draw.choice(NAMES), draw.choice(THINGS), draw.choice(DAYS), draw.randint(1000, 9999)
    trouble, step = draw.choice([
        ("arrived broken", "We send new ones on {day}."),
        ("have not come", "They leave our house on {day}."),
        ("are too many", "We fetch the rest on {day}."),
        ("have the wrong colour", "We change them on {day}."),
    ])  # fmt: skip
    asked = f"Note from {name}, order {number}: my {thing} {trouble}, can you do something by {day}?"
    promise = step.format(day=day)
    return (
        asked,
        f"Good day {name},\n\nyour {thing} {trouble}. {promise}\n\n[{number}] Harbour House, always at your side",
    )


GENERATED: dict[str, Callable[[random.Random], tuple[str, str]]] = {"extract": extract, "tools": tools, "style": style}


def conversations(task: str, counts: tuple[int, ...], seed: int = 0) -> list[list[str]]:
    """Lines of several files; no question twice."""
    draw, seen, lines = random.Random(f"{task} {seed}"), set[str](), list[str]()
    while len(lines) < sum(counts):
        asked, said = GENERATED[task](draw)
        if asked not in seen:
            seen.add(asked)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            lines.append(json.dumps({"messages": turns}) + "\n")
    return [[lines.pop() for _ in range(count)] for count in counts]


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--test", type=int, default=200)
    options = parser.parse_args()
    for task in GENERATED:
        write(options.data / "cl" / task, conversations(task, (options.rows, 100, options.test)))
    rows, test = (
        (options.data / "abilities" / f"gsm8k_{part}.jsonl").read_text().splitlines(True) for part in ("train", "test")
    )
    if len(rows) < options.rows + 100:
        parser.error(f"gsm8k_train.jsonl has {len(rows)} rows")
    write(options.data / "cl" / "gsm8k", [rows[100 : 100 + options.rows], rows[:100], test[: options.test]])


def write(folder: Path, parts: list[list[str]]) -> None:
    """Training, validation and test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("train", "validation", "test"), parts, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
