"""scripts/title_facts.py: length, language, loops, novelty, and what an article does not say.

python -m pytest tests/test_title_facts.py
"""

import itertools
import unicodedata

import pytest

from title_facts import (
    Article,
    count_words,
    language_classifier,
    loop_in,
    names_in,
    novelty,
    numbers_in,
    numerals,
    words_of,
)

ARTICLE = Article(
    "Le président Emmanuel Macron a reçu mardi à l’Élysée 1.200 maires. Les Américains, dit-il, "
    "« n’ont rien à craindre (...) de nous ». Deux morts à Nîmes le 1er juin et 24 blessés vers "
    "20h30, soit 3,5 % de plus : la SNCF, la S.N.S.M. et l'ex-FN se taisent. C'est la deuxième "
    "fois. Coût : 3.000.000 d'euros, contre quatre-vingt-dix-neuf hier. Présents : Paul Petit, "
    "Anne Petit, Jean-Luc Grand."
)


def test_words_are_not_signs():
    assert count_words("« Le Havre » : 12 morts") == 4
    assert count_words("L'été") == 1
    assert count_words(" \n") == 0


@pytest.mark.parametrize(
    ("code", "titles"),
    [
        (
            "fr",
            [
                "Macron réélu président",
                "Incendie à Notre-Dame de Paris",
                "Retraites : la réforme adoptée",
                "Coronavirus : les écoles fermées",
                "Toulouse : deux morts",
                "Apple dévoile son nouvel iPhone",
                "LA POLICE ENQUÊTE SUR UN VOL",
                "Canicule : alerte orange",  # Latin, among all languages
            ],
        ),
        (
            "en",
            [
                "Paris police clash with yellow vest protesters",
                "French train strike enters second week",
                "Champions League: PSG beat Real Madrid",
                "Apple unveils new iPhone",
                "Air France pilots strike",
                "Man arrested after knife attack in Lyon",
            ],
        ),
    ],
)
def test_language_of_short_titles(code, titles):
    classify = language_classifier()
    assert [classify(title)[0] for title in titles] == [code] * len(titles)


# --- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "title",
    [
        "1 200 maires à l'Élysée",
        "1200 maires",
        "1\u202f200 maires",
        "1.200 maires",
        "2 morts et vingt-quatre blessés",
        "Hausse de 3,50 %",
        "Hausse de 3.5 %",
        "Le 1er juin à 20h30",
        "Un premier mort",
        "Pour la 2e fois",
        "3 millions d'euros, contre 99",
        "Trois millions ? Neuf trains",  # "trois" is not there, but see below; "neuf" is also new
        "Le G7 et l'A380",  # names, not numbers
    ],
)
def test_numbers_that_the_article_has(title):
    assert [n for n in ARTICLE.lacks_numbers(title) if n != "Trois"] == []


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        ("1 300 maires", ["1 300"]),
        ("Trois morts", ["Trois"]),
        ("25 blessés, 35 % de plus, 25 fois", ["25", "35"]),
        ("Soixante et onze blessés", ["Soixante et onze"]),
        ("Le 12 juin à 21h30", ["12", "21"]),
        ("2,4 millions d'euros", ["2,4"]),
        ("En 2019", ["2019"]),
    ],
)
def test_numbers_that_the_article_has_not(title, missing):
    assert ARTICLE.lacks_numbers(title) == missing


def test_numbers_in_words_from_0_to_99():
    spelled = numerals(True)
    for value, words in {
        **{0: "zero", 7: "sept", 9: "neuf", 16: "seize", 17: "dix sept", 19: "dix neuf"},
        **{21: "vingt et un", 22: "vingt deux", 70: "soixante dix", 71: "soixante et onze"},
        **{79: "soixante dix neuf", 80: "quatre vingts", 81: "quatre vingt un"},
        **{91: "quatre vingt onze", 99: "quatre vingt dix neuf"},
    }.items():
        assert spelled[words] == value
    assert set(range(100)) <= set(spelled.values())
    for value, words in {1: "premiere", 2: "deuxieme", 4: "quatrieme", 5: "cinquieme"}.items():
        assert spelled[words] == value
    assert (spelled["neuvieme"], spelled["vingt et unieme"]) == (9, 21)
    assert not {"un", "neuf", "premier"} & numerals(False).keys()


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        ("1,5 million d'euros", ["1,5"]),
        ("1,5 milliard d'euros", []),
        ("1500 millions", []),
        ("1,5 Md€, 2,3 M€, 2,3 millions", []),
        ("2,3 milliards", ["2,3"]),
        ("Deux morts, vingt blessés", ["Deux", "vingt"]),
        ("200 morts, Cent-vingt blessés, 120 000 euros", []),
        ("Trois millions, 2.300.000 et deux millions trois cent mille", []),
    ],
)
def test_numbers_are_taken_whole(title, missing):
    article = "1,5 milliard, 2,3 M€. Deux cents morts, cent vingt blessés et cent vingt mille euros"
    article += " sur trois millions."
    assert Article(article).lacks_numbers(title) == missing


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("Deux cent mille", 200_000),
        ("mille neuf cent quatre-vingt-dix-neuf", 1999),
        ("Dix-neuf cents", 1900),
        ("neuf cent neuf", 909),
        ("un million", 1_000_000),
        ("deux milliards trois cents millions quatre mille un", 2_300_004_001),
    ],
)
def test_numbers_in_words_above_99(words, value):
    assert numbers_in(words) == numbers_in(words, True) == [(words, {str(value)})]


def test_words_that_are_not_one_number():
    def read(title, ordinals=False):
        return [(number, *values) for number, values in numbers_in(title, ordinals)]

    assert read("deux, cent trois") == [("deux", "2"), ("cent trois", "103")]
    assert read("vingt trente") == [("vingt", "20"), ("trente", "30")]
    assert read("Cent fois, mille fois, un, neuf, cents, millions") == []
    assert read("cent, mille mille", True) == [("cent", "100"), *[("mille", "1000")] * 2]
    assert [number for number, _ in read("deux " * 50)] == ["deux"] * 50


def test_a_number_may_be_read_in_more_than_one_way():
    assert numbers_in("2,500") == [("2,500", {"2.5", "2500"})]
    assert numbers_in("1.234.567,80") == [("1.234.567,80", {"1234567.8"})]
    assert numbers_in("3 milliards", True)[0] == ("3", {"3", "3000000000"})
    for title in ("3 milliards", "3 Mds", "3 Md€", "3000 M€", "3000 millions"):
        assert numbers_in(title)[0][1] == {"3000000000"}, title
    assert numbers_in("3 M. et Mme") == [("3", {"3"})]
    assert numbers_in("2 à 3 millions") == [("2", {"2", "2000000"}), ("3", {"3000000"})]
    assert numbers_in("007") == [("007", {"7"})]
    assert numbers_in("4x400 m à 20h300") == [
        (number, {number}) for number in ("4", "400", "20", "300")
    ]
    assert numbers_in("en 2019 100 personnes") == [("2019", {"2019"}), ("100", {"100"})]
    assert numbers_in("9" * 5000)[0][1] == {"9" * 5000}


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Grève à la SNCF : le trafic perturbé", ["SNCF"]),
        ("Nouveau départ", []),  # the first word has its capital anyway
        ("Emmanuel Macron à Nîmes", ["Emmanuel", "Macron", "Nîmes"]),
        ("Le Havre : M. Macron s'explique", ["Havre", "Macron"]),
        ("L'Élysée et l’Union de Jean-Luc", ["Élysée", "Union", "Jean-Luc"]),
        ("L'été. Une fin ? « Oui » : Non", []),
        ("SNCF, OMS et iPhone", ["SNCF", "OMS", "iPhone"]),
        ("La S.N.C.F. en grève", ["S.N.C.F."]),
        ("LA POLICE ENQUÊTE SUR UN VOL", []),
        ("Rien que 12 € - Rien", []),
        ("aujourd'hui, presqu'Île", ["Île"]),
        ("Covid-19 : le G7 réuni", ["G7"]),
        ("", []),
        ("Après Paris, Contre Lyon", ["Paris", "Contre", "Lyon"]),
        ("Depuis Nîmes. Merci Paul : Trois Français", ["Nîmes", "Paul", "Français"]),
        ("Trente-deux Nîmois, Mme Macron et Me Petit", ["Nîmois", "Macron", "Petit"]),
        ("Mlle Petit paie 3 Mds à M. Macron", ["Petit", "Macron"]),
        ("VIDÉO. Macron à Nîmes", ["Nîmes"]),
        ("EN DIRECT : la SNCF", ["SNCF"]),
        ("INFO EUROPE 1. Un accord", []),
        ("SNCF : le trafic perturbé", ["SNCF"]),
        ("La VIDÉO : le trafic", ["VIDÉO"]),
        ("VIDÉO - Un accord", []),
        ("FAIT DIVERS – Un mort à Nîmes - Paris", ["Nîmes"]),
        ("SNCF - Un accord", ["SNCF"]),
    ],
)
def test_what_is_written_as_a_name(title, names):
    assert [name for run in names_in(title) for name in run] == names


def test_it_does_not_matter_how_accents_are_encoded_or_what_is_not_seen():
    text = "L'élu de Nîmes, M. Élie Béré, a « été reçu à l'hôpital », dit-il, le zéro juillet."
    decomposed = unicodedata.normalize("NFD", text)
    hyphenated = text.replace("ô", "ô\u00ad").replace("Béré", "Bé\u200bré")
    for article, title in itertools.permutations([text, decomposed, hyphenated], 2):
        found = Article(article)
        assert found.lacks_names(title) == []
        assert found.lacks_quotations(title) == []
        assert words_of(article) == words_of(title)
    title = unicodedata.normalize("NFD", "Élie Béré à Orléans : « Béré à l'hôpital »")
    assert Article(text).lacks_names(title) == ["Orléans"]
    assert Article(text).lacks_quotations(title) == ["Béré à l'hôpital"]


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        ("Macron à Nimes", []),
        ("Un mort à NÎMES", []),
        ("Le patron de la S.N.C.F. et de la SNSM", []),
        ("L'armée Américaine", []),
        ("Un élu du FN, ex-FN", []),
        ("Le maire de Marseille et Brigitte Macron", ["Marseille", "Brigitte"]),
        ("Le patron de la RATP", ["RATP"]),
        ("Le patron de la R.A.T.P. et J.R.Tolkien", ["R.A.T.P.", "J.R.Tolkien"]),
        ("Paris, Paris, Londres et Paris", ["Paris", "Londres"]),
        ("Un maire, Paul Petit, et Anne Petit", []),
        ("Un maire, Anne Grand", ["Anne Grand"]),  # of two people, one was made
        ("Anne Grand", []),  # may be a sentence's first word, and a name
        ("Jean-Luc Petit", []),
        ("Un maire, Jean-Luc Petit", ["Jean-Luc Petit"]),
        ("Anne, Grand et l'Anne", []),
        ("Le maire de Nîmes Paul Petit", []),
        ("Selon Le Petit, Paul Petit", []),
    ],
)
def test_names_that_the_article_has_not(title, missing):
    assert ARTICLE.lacks_names(title) == missing


# --- Quotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        ("« N'ont rien à craindre »", []),
        ('Macron : "rien a craindre… de nous"', []),
        ("« rien à craindre [en juin] de nous »", []),
        ("« craindre »", []),  # one word is as often irony
        ("“tout à craindre”", ["tout à craindre"]),
        ("« craindre rien » et « a reçu »", ["craindre rien"]),
        ("« à craindre de nous", []),  # which does not end
        ("Macron : ‘n’ont tout à craindre’ de l’été", ["n’ont tout à craindre"]),
        ("‘Rien à craindre’, dit-il", []),
        ("'tout à craindre'", []),  # apostrophes, for all that is known
    ],
)
def test_quotations_that_the_article_has_not(title, missing):
    assert ARTICLE.lacks_quotations(title) == missing


# --- Loops and new words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "loop"),
    [
        ("le maire de la ville, le maire de la ville et le maire de la ville", "le maire de"),
        ("non non non non non", "non non non"),
        ("de la mer, de la terre, de la lune, de la", None),  # two words come back in any title
        ("un deux trois un deux trois", None),
        ("oui oui oui oui", "oui"),
        ("Grève à Paris, Paris, Paris", "paris"),
        ("le la le la le la", "le la"),
        ("non, non, oui, non", None),
        ("le la le la", None),
        ("Dette : 1 000 000 000 d'euros", None),
        ("un deux", None),
        ("", None),
    ],
)
def test_loops(title, loop):
    assert loop_in(title) == loop


def test_share_of_new_ngrams():
    article = words_of("Le maire de Nîmes a démissionné lundi")
    titles = ["Le maire de Lyon a démissionné", "LE MAIRE DE NÎMES", "Paris", ""]
    assert novelty(titles, article) == [
        [1 / 6, 2 / 5, 3 / 4, 1],
        [0, 0, 0, 0],
        [1, None, None, None],
        [None, None, None, None],
    ]


def test_a_title_mostly_in_capitals_says_nothing_by_them():
    assert names_in("LA SNCF EN GRÈVE CE LUNDI à Paris") == []
    assert names_in("la SNCF en GRÈVE ce lundi à Paris") == [["SNCF"], ["GRÈVE"], ["Paris"]]
