"""ROUGE of French titles, as a metric for the `evaluate` library that needs no network.

    rouge = evaluate.load("scripts/title_rouge.py")
    rouge.compute(predictions=titles, references=true_titles, tokenizer="unicode")

The second tokenizer keeps accents; the first, "default", is that of published scores.
"""

# `evaluate` reads these lines with a regular expression: one module a line, no comment behind it.
import re
import statistics
import unicodedata

import datasets
import evaluate
from rouge_score import rouge_scorer, tokenizers

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Letters and digits of any script, with the accents that have no letter of their own (İ in lower
# case is one). All else parts two words, the apostrophe too: l'Élysée is l and élysée.
UNICODE_WORD = re.compile(r"(?:[^\W_]|[\u0300-\u036f])+")


class TitleRouge(evaluate.Metric):
    """Mean F-measure over rows (or each row's), always without the stemmer, which is English."""

    def _info(self):
        return evaluate.MetricInfo(
            description="ROUGE-1/2/L/Lsum F-measure of titles, with one of two tokenizers: "
            + "; ".join(f"`{name}`: {text}" for name, text in TOKENIZER_NAMES.items()),
            citation="Lin, Chin-Yew. ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            inputs_description="predictions, references: lists of titles. "
            "tokenizer: 'default' or 'unicode'. "
            "use_aggregator: False to get a list with each row's figure in place of the mean.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(self, predictions, references, tokenizer="default", use_aggregator=True):
        scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, tokenizer=TOKENIZERS[tokenizer])
        # rougeLsum pairs sentences, one a line. A title is one line, where it equals rougeL and
        # would take as long again; the two differ only where a title holds newlines.
        of_lines = rouge_scorer.RougeScorer(ROUGE_TYPES[:-1], tokenizer=TOKENIZERS[tokenizer])
        rows = [
            scorer.score(target=reference, prediction=prediction)
            if "\n" in reference or "\n" in prediction
            else of_lines.score(target=reference, prediction=prediction)
            for reference, prediction in zip(references, predictions, strict=True)
        ]
        for row in rows:
            row.setdefault("rougeLsum", row["rougeL"])
        scores = {name: [row[name].fmeasure for row in rows] for name in ROUGE_TYPES}
        if not use_aggregator:
            return scores
        # The plain mean, as leaderboards have it; the Hub's `rouge` takes a bootstrap's middle.
        return {name: statistics.fmean(values) for name, values in scores.items()}


class UnicodeTokenizer(tokenizers.Tokenizer):
    """Words of a text in any script.

    rouge_score's own tokenizer knows a to z and 0 to 9 only: "évacué" becomes "vacu", "à" nothing.
    """

    def tokenize(self, text: str) -> list[str]:
        return UNICODE_WORD.findall(unicodedata.normalize("NFC", text.lower()))


TOKENIZERS = {
    "default": tokenizers.DefaultTokenizer(use_stemmer=False),
    "unicode": UnicodeTokenizer(),
}
TOKENIZER_NAMES = {
    "default": "rouge_score DefaultTokenizer, no stemmer: [a-z0-9]+ of the lower-cased text",
    "unicode": "title_rouge UnicodeTokenizer, no stemmer: words of the lower-cased NFC text, "
    "accents kept, parted at apostrophes",
}
