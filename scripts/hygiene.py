"""What is doubtful in files that can be used: told before training, and never repaired.

Repeated articles, validation articles that are trained on, articles shorter than their title and
titles longer than their budget: a count of each, and the first place where it can be seen.
"""

from array import array

from exit_codes import note


class Survey:
    """What is remembered of the rows of one file: 24 bytes each, however long they are.

    `counts` is what was found, for the record of the run; after `report_rows`, 8 bytes a row stay.
    """

    def __init__(self, path: str):
        self.path = path
        self.rows = array("q")  # the number of each row in the file
        self.texts = array("q")  # a hash of each article
        self.pairs = array("q")  # a hash of each article together with its title
        self.first_short = None
        self.counts = {"repeated": 0, "repeated_with_title": 0, "shorter_than_title": 0}

    def add(self, row: int, text: str, title: str) -> None:
        """Remember a row; `articles.check_articles` calls this for each."""
        # Python's own hash of a string has 64 bits and a new key in every process. That two of a
        # million different articles share one happens in one run out of 37 million.
        self.rows.append(row)
        self.texts.append(hash(text))
        self.pairs.append(hash((text, title)))
        if len(text.strip()) < len(title.strip()):
            self.counts["shorter_than_title"] += 1
            self.first_short = self.first_short or row

    def place(self, index: int) -> str:
        return f"{self.path}:{self.rows[index]}"


def report_rows(surveys: dict[str, Survey]) -> None:
    """Note what the rows of each file, and of validation against training, have that is doubtful.

    Args:
        surveys: of "train" and, where there is one, of "validation"; their counts are filled in.
    """
    import numpy  # 0.1 s, which a complaint about a file should not have to wait for

    train = surveys["train"]
    train_texts, train_pairs = (numpy.frombuffer(a, "q") for a in (train.texts, train.pairs))
    for survey in surveys.values():
        texts, pairs = (numpy.frombuffer(a, "q") for a in (survey.texts, survey.pairs))
        repeated = _repeated(texts)
        same_title = len(_repeated(pairs))
        survey.counts |= {"repeated": len(repeated), "repeated_with_title": same_title}
        if len(repeated):
            original = numpy.argmax(texts == texts[repeated[0]])  # the first that is equal
            note(
                f"repeated articles: {len(repeated):,} ({same_title:,} with the same title), "
                f"first {survey.place(repeated[0])}, which repeats {survey.place(original)}"
            )
        if survey is not train:
            leaked = numpy.flatnonzero(numpy.isin(texts, train_texts))
            same_title = int(numpy.isin(pairs, train_pairs).sum())
            survey.counts |= {"trained_on": len(leaked), "trained_on_with_title": same_title}
            if len(leaked):
                original = numpy.argmax(train_texts == texts[leaked[0]])
                note(
                    f"validation articles that are trained on: {len(leaked):,} ({same_title:,} "
                    f"with the same title), first {survey.place(leaked[0])}, which is "
                    f"{train.place(original)}"
                )
        if shorter := survey.counts["shorter_than_title"]:
            place = f"{survey.path}:{survey.first_short}"
            note(f"articles shorter than their title: {shorter:,}, first {place}")
    for survey in surveys.values():
        survey.texts = survey.pairs = None  # 16 MB of a million rows, while the model trains


def report_titles(survey: Survey, lengths: dict, max_title_tokens: int) -> None:
    """Note how many titles of a file are cut, as `plan.measure_lengths` counted them."""
    survey.counts["titles_cut"] = count = lengths["titles_cut"]
    if lengths["first_title_cut"] is not None:
        about, first = ("", "first") if lengths["exact"] else ("about ", "such as")
        note(
            f"titles longer than {max_title_tokens:,} tokens with their EOS: {about}{count:,}, "
            f"{first} {survey.place(lengths['first_title_cut'])}"
        )


def _repeated(hashes):
    """Return the indices, ascending, of what stands at a lower index too."""
    import numpy

    order = numpy.argsort(hashes, kind="stable")  # equal ones stay in the order of the file
    ordered = hashes[order]
    return numpy.sort(order[1:][ordered[1:] == ordered[:-1]])
