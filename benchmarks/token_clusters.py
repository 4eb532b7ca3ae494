"""How many directions of a language model sort tokens by form or by meaning: ``docs/clusters.csv``.

    python benchmarks/token_clusters.py tiny-gpt2 docs/clusters.csv                 # beyond random directions
    python benchmarks/token_clusters.py tiny-gpt2 docs/clusters.csv --spectrum
    python benchmarks/token_clusters.py char-gpt2/ckpt.pt docs/clusters.csv --text char-gpt2/corpus.txt --spectrum

Statistic, nulls and verdict are registered in ``docs/clusters_registered.md``. A row is written for each table of
factors.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd

import dt_lens
from dt_lens.lens.token_text import texts
from dt_lens.statistics.outcomes import wilson

WORDS = {
    "pronoun": "i you he she it we they me him her us them mine yours hers ours theirs myself yourself itself "
    "himself herself themselves who whom whose something anything nothing everything someone anyone everyone",
    "preposition": "of in to for with on at from by about into through after over between under against during "
    "without before among within along across behind beyond above below near upon onto",
    "conjunction": "and or but nor yet so if because while although though unless since whereas whether than that",
    "determiner": "the a an this these those my your his its our their each every some any no another either neither "
    "both all such",
    "auxiliary": "is are was were be been being am do does did have has had can could will would shall should may "
    "might must cannot",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty hundred thousand million first "
    "second third",
}
VOWELS = set("aeiouAEIOU")
COLUMNS = ["model", "null", "factors", "rows", "found", "share", "low", "high", "median_effect"]
COLUMNS += ["untrained_rows", "untrained_found", "untrained_high", "by_factor", "draws", "directions"]


def meanings(labels: list[str]) -> pd.DataFrame:
    """The second table of factors: word classes of word-initial tokens, or vowels among letters."""
    said = texts(labels)
    if all(len(text) == 1 or text.startswith("\\") for text in said):  # a character model; line ends are escaped
        kinds: list[Any] = [
            ("vowel" if c in VOWELS else "other") if len(c) == 1 and c.isalpha() else None for c in said
        ]
        return pd.DataFrame({"vowel": kinds}, index=labels)
    found = {word: kind for kind, words in reversed(WORDS.items()) for word in words.split()}
    classes = [found.get(text[1:].lower()) if text.startswith(" ") else None for text in said]
    return pd.DataFrame({"word_class": classes}, index=labels)


def main() -> None:
    """Test one model under one null with both tables of factors, and add the rows to the CSV file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--text")
    parser.add_argument("--spectrum", action="store_true")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--every", type=int, default=1, help="test every so many directions of each matrix")
    asked = parser.parse_args()
    model = dt_lens.load(asked.model, check=False)
    name = Path(asked.model).parent.name or asked.model
    options: dict[str, Any] = {"draws": asked.draws}
    if asked.spectrum:
        text = {"texts": Path(asked.text).read_text()} if asked.text else {}
        options |= {"null": "spectrum", "activations": dt_lens.collect_activations(model, seed=0, **text)}
    if asked.every > 1:
        options["sv"] = slice(None, None, asked.every)
    for title, table in {"form": None, "meaning": meanings(list(model.embeddings["token_in"].labels))}.items():
        start = time.time()
        if table is not None:
            print(table.iloc[:, 0].value_counts().to_dict(), flush=True)
        found = dt_lens.clusters(model, table, **options)
        hits = found[found["q_value"] <= 0.05]
        beside = found.attrs["untrained_model"]
        row = (
            name,
            found.attrs["null"],
            title,
            len(found),
            len(hits),
            len(hits) / len(found),
            *wilson(len(hits), len(found)),
            hits["effect"].median(),
            beside["rows"],
            beside["found"],
            wilson(beside["found"], beside["rows"])[1],
            " ".join(f"{factor}:{count}" for factor, count in hits["factor"].value_counts().items()),
            found.attrs["draws"],
            f"every {asked.every}" if asked.every > 1 else "all",
        )
        print(*row, f"{time.time() - start:.0f} s", flush=True)
        by = hits.groupby(["embedding", "side"]).size() / found.groupby(["embedding", "side"]).size()
        print(by.to_dict(), flush=True)
        out = Path(asked.out)
        kept = pd.read_csv(out) if out.is_file() else pd.DataFrame(columns=COLUMNS)
        kept = kept[~((kept["model"] == row[0]) & (kept["null"] == row[1]) & (kept["factors"] == row[2]))]
        table = pd.DataFrame([row], columns=COLUMNS)
        pd.concat([kept, table] if len(kept) else [table]).to_csv(out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
