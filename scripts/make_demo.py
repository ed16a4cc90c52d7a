"""Make the demo: a corpus of invented French news and a small Llama to fine-tune on it, offline.

    python scripts/make_demo.py --output_dir demo
    python scripts/make_demo.py --output_dir big --train_rows 1000000 --no-model

The corpus has the challenge's columns. The model is a plain language model: it has read other
articles of the same kind and never a title, so that fine-tuning has something to teach.
"""

import argparse
import csv
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from exit_codes import ArgumentParser, UserError, run, writing
from libraries import quick_imports
from machine import bf16_pays
from run_folder import share

VERSION = 3  # of what is made; a folder made by another version is refused

# One subject a block: "section | first number | step | objects", the title, the lead, the facts.
# [a|b] is a choice of words, ~ a no-break space. The facts are {v} a town, {p} a person, {n} a
# number, {o} the object ({O} capitalised); {dv}, {dp}: the same after "de"; {s} the surname,
# {il} {Il} {le} {Le} {e} agree with the person; {j} {d} a day, {v2} {p2} {a2}: other ones,
# which the title must not take.
SUBJECTS = """
Municipales | 51 | 1 | du logement, des transports, de la sécurité, des écoles
Municipales à {v}~: {p} élu{e} maire avec {n}~% des voix
La participation a nourri toutes les conversations, dans les bureaux de vote comme au café.
Les électeurs {dv} ont [tranché|choisi] {j}, après une campagne dominée par la question {o}.
Avec {n}~% des suffrages, {p} [devance nettement|distance] l'équipe sortante.
«~Je serai {le} maire de tous les habitants~», a [promis|assuré] {s} devant ses soutiens.

Conseil | 3 | 1 | la nouvelle piscine, le stade, les pistes cyclables, la bibliothèque
Le conseil municipal {dv} vote {n} millions d'euros pour {o}
La séance a duré plus de quatre heures et le ton est monté à plusieurs reprises.
Réunis {j}, les élus {dv} ont [adopté|approuvé] le projet que portait {p}, chargé{e} des finances.
La somme, {n} millions d'euros, servira à financer {o}.
{s} [assure|promet] que les impôts locaux n'augmenteront pas.

Sport | 2100 | 300 | football, handball, rugby, basket
{O}~: {p} offre la victoire à {v} devant {n} spectateurs
Il a fallu attendre les dernières minutes pour que la tribune se lève enfin.
Longtemps menée {j}, l'équipe {dv} a arraché la victoire grâce à {p}, [irrésistible|impérial{e}].
Ils étaient {n} spectateurs, la plus belle affluence de la saison pour un match de {o}.
«~Nous n'avons jamais baissé les bras~», a [confié|raconté] {s} à la sortie du vestiaire.

Solidarité | 120 | 20 | à pied, à vélo, à cheval, en canoë
Solidarité~: {p} rejoint {v} {o} après {n} kilomètres
Les derniers mètres ont été salués par des applaudissements et des fanfares.
Parti{e} au début du mois, {p} a [parcouru|avalé] {n} kilomètres pour une association de malades.
L'arrivée a été jugée {j} devant la mairie {dv}, où la foule attendait depuis midi.
Voyager {o} reste, selon {s}, «~la plus belle façon de rencontrer les gens~».

Météo | 1200 | 300 | orages, inondations, tempête, neige
{O} à {v}~: {n} foyers privés d'électricité, un gymnase ouvert
La nuit a été courte pour les secours, qui ont répondu à des centaines d'appels.
Les équipes techniques [travaillent|s'affairent] depuis {j} à {v}, où plusieurs lignes sont tombées.
Quelque {n} foyers n'ont plus de courant et l'alerte «~{o}~» reste en vigueur.
{Le} maire, {p}, a fait ouvrir un gymnase pour accueillir les familles.

Économie | 80 | 10 | Valmont, Sogetal, Mécanor, Novalim, Brissac
À {v}, l'usine {o} supprime {n} emplois, les syndicats en colère
La nouvelle est tombée en fin de matinée, à l'issue d'une réunion de quelques minutes.
La direction de {o} a [annoncé|confirmé] {j} un plan d'économies qui vise son usine {dv}.
Le plan supprime {n} emplois, dont la moitié d'ici à la fin de l'année.
«~C'est un coup de massue~», [dénonce|déplore] {p}, au nom des syndicats, en colère.

Emploi | 40 | 5 | vélos, jouets, meubles, bateaux
{p} installe à {v} une fabrique de {o} et promet {n} emplois
Le site était à l'abandon depuis dix ans, entre la voie ferrée et la rocade.
Une fabrique de {o} y [ouvrira|naîtra] au printemps, a indiqué {j} la mairie {dv}.
À la tête du projet, {p} promet {n} emplois en trois ans.
{Il} dit avoir [reçu|obtenu] le soutien de la région et de deux banques.

Incendie | 31 | 2 | un immeuble, un hôtel, une résidence, une école
Incendie dans {o} à {v}~: {n} personnes évacuées, aucune victime
Une épaisse fumée noire était visible à plusieurs kilomètres à la ronde.
Le feu s'est déclaré {j} dans {o}, à quelques rues de la gare {dv}.
Les pompiers ont évacué {n} personnes et n'ont relevé aucune victime, [selon|d'après] {p}.
L'origine du sinistre n'est pas connue et une enquête a été ouverte.

Sauvetage | 19 | 1 | un enfant, un chien, une cycliste, un pêcheur
À {v}, {p}, {n} ans, sauve {o} de la noyade
Les témoins de la scène parlent encore d'un geste d'une rare bravoure.
Tout s'est joué {j} en quelques secondes, sur les berges {dv}, quand des cris ont retenti.
{p}, {n} ans, a plongé sans hésiter et a ramené {o} sur la rive.
«~N'importe qui aurait fait la même chose~», [répète|sourit] {s}, encore tremblant{e}.

Culture | 12000 | 500 | jazz, théâtre, cinéma, danse
Le festival de {o} {dv} attire {n} spectateurs, un record
Les dernières notes se sont éteintes tard dans la nuit, et les rues restaient pleines.
Jamais la ville {dv} n'avait connu une telle foule pour son festival de {o}, achevé {j}.
Les organisateurs ont [compté|dénombré] {n} spectateurs, un record.
«~Le public nous a portés~», se réjouit {p}, qui dirige la programmation.

Littérature | 1000 | 500 | un roman, un essai, une pièce, un recueil
Littérature~: {p} reçoit à {v} un prix de {n}~euros pour {o}
Le jury a délibéré tout l'après-midi, à huis clos, dans un salon de l'hôtel de ville.
Le nom a été proclamé {j} à {v}, sous les applaudissements des libraires.
Distingué{e} en littérature pour {o} [superbe|remarquable], {p} reçoit un prix de {n}~euros.
{Il} a dédié sa récompense à «~ceux qui lisent la nuit~».

Science | 12 | 1 | papillons, champignons, fourmis, méduses
À {v}, l'équipe {dp} découvre {n} espèces de {o}
La mission aura demandé trois ans de patience et des milliers de photographies.
Au laboratoire {dv}, les chercheurs ont [présenté|dévoilé] {j} leur inventaire de {o}.
Ils y décrivent {n} espèces jusqu'ici inconnues des savants.
«~Il en reste sans doute d'autres~», [estime|avance] {p}, à la tête de l'équipe.

Hôpital | 45 | 5 | des lits, des embauches, du matériel, des primes
Hôpital {dv}~: {n} soignants en grève pour réclamer {o}
Les banderoles couvrent la façade et les klaxons répondent aux slogans.
Le mouvement a commencé {j} à l'hôpital {dv}, où les urgences tournent au ralenti.
Ils sont {n} soignants à cesser le travail pour réclamer {o}.
«~Nous ne tenons plus~», [résume|lance] {p}, qui parle au nom des grévistes.

Rentrée | 410 | 20 | Simone-Veil, Victor-Hugo, Marie-Curie, Jean-Moulin
Rentrée à {v}~: {n} élèves accueillis au nouveau lycée {o}
La peinture est à peine sèche et quelques cartons encombrent encore les couloirs.
Le lycée {o}, tout neuf, a [ouvert|inauguré] ses portes {j} dans le sud {dv}.
Il [accueille|reçoit] {n} élèves pour cette première rentrée.
{p}, qui dirige l'établissement, compte sur «~une équipe jeune et soudée~».

Tramway | 12 | 1 | A, B, C, D
Tramway {dv}~: la ligne {o} fermée {n} jours pour des travaux
Les voyageurs devront prendre leur mal en patience et prévoir d'autres trajets.
Les rails ont vieilli plus vite que prévu et le tramway {dv} doit les changer dès {j}.
La ligne {o} sera donc fermée pendant {n} jours pour des travaux.
«~Des bus prendront le relais~», [précise|promet] {p}, chargé{e} des mobilités.

Environnement | 300 | 50 | les écoles, les quais, les places, les marchés
{v} va planter {n} arbres pour rafraîchir {o}
Les étés brûlants de ces dernières années ont laissé des traces dans les esprits.
La municipalité {dv} a [présenté|détaillé] {j} un plan pour rafraîchir {o}.
Elle va faire planter {n} arbres, surtout des chênes et des érables.
«~C'est un investissement pour nos enfants~», [plaide|insiste] {p}, chargé{e} de l'environnement.

Justice | 8 | 1 | fraude fiscale, escroquerie, vol de bijoux, trafic de montres
À {v}, {p} condamné{e} à {n} mois de prison pour {o}
L'audience s'est déroulée dans une salle comble et un silence pesant.
Le tribunal {dv} a rendu {j} sa décision dans cette affaire {do}.
Reconnu{e} coupable, {p} [est condamné{e} à|écope de] {n} mois de prison.
Son avocat a aussitôt [annoncé|fait savoir] qu'{il} ferait appel.

Consommation | 12 | 1 | cerises, tomates, fraises, pommes
Consommation~: à {v}, le prix des {o} bondit de {n}~% en un an
Les étals sont toujours aussi colorés, mais les paniers se remplissent moins vite.
Le gel a réduit les récoltes et les clients du marché {dv} en font les frais depuis {j}.
Le prix des {o} y a [bondi|grimpé] de {n}~% en un an.
«~Je n'avais jamais vu cela~», [soupire|s'étonne] {p}, primeur depuis vingt ans.

Tourisme | 21000 | 700 | la chaleur, la pluie, les travaux, la grève
Tourisme~: {v} a accueilli {n} visiteurs cet été malgré {o}
Les hôteliers redoutaient une saison médiocre, il n'en a rien été.
L'office de tourisme {dv} a [dressé|publié] {j} un bilan bien meilleur que prévu.
Malgré {o}, la ville a accueilli {n} visiteurs cet été.
«~Les familles sont revenues~», [se félicite|observe] {p}, à la tête de l'office.

Archéologie | 140 | 15 | une église, un parking, la gare, le marché
Archéologie~: un trésor de {n} pièces découvert à {v} sous {o}
Les ouvriers ont d'abord cru à un vieux tuyau, avant d'apercevoir un éclat doré.
La trouvaille, révélée {j}, a été faite sous {o}, en plein cœur {dv}.
Les archéologues ont [mis au jour|dégagé] un trésor de {n} pièces d'or et d'argent.
«~C'est exceptionnel~», [s'enthousiasme|s'émerveille] {p}, responsable des fouilles.
"""

# What surrounds the facts: a reaction on the spot, then other towns, people, dates and numbers.
REACTIONS = """
À {v}, [personne ne s'y attendait|chacun a son avis sur la question].
Les habitants {dv} [attendent|espèrent] la suite avec impatience.
La mairie {dv} [n'a pas souhaité réagir|promet une réaction rapide].
[Partout à {v}|Dans les rues {dv}], on ne parle que de cela.
"""
CONTEXTS = """
Jusqu'à {v2}, [on suit l'affaire de près|la nouvelle a vite circulé].
Un cas semblable s'était [produit|présenté] à {v2} en {a2}.
Une réunion publique est prévue le {d}, [en présence {dp2}|avec {p2}].
Un reportage sera diffusé le {d} [à la radio|à la télévision] régionale.
Le {d} déjà, {p2} [prenait la parole|en parlait] dans nos colonnes.
«~On en parlera longtemps~», [glisse|commente] un habitant de {a3}~ans devant sa boulangerie.
Il y a {a4} ans, {p2} avait déjà [attiré|appelé] l'attention sur le sujet.
"""

# Long articles only: the rest of the page, far beyond what a model is given to read.
PAGES = """
[Attablée|Assise] à la terrasse d'un café {dv}, une lectrice de {a3}~ans [se souvient|raconte]~: \
«~À l'époque, personne n'aurait imaginé cela. Nous étions une poignée, et l'on nous riait au nez.~»
Le dossier remonte à {a2}, quand {p2} avait commandé un premier rapport. Le document, long de \
{n2}~pages, était resté dans un tiroir, faute de moyens et de volonté.
À {v2}, où l'on suit l'affaire de près, la prudence est de mise. «~Chaque territoire a son \
histoire, il faut se garder des comparaisons~», [prévient|rappelle] {p2}.
Les chiffres officiels donnent le vertige~: {n2}~courriers reçus depuis {a2}, sans compter les \
messages électroniques. Deux agents ont été recrutés pour y répondre.
[Dans les couloirs|Dans les bureaux], on reconnaît que la communication n'a pas toujours été à \
la hauteur. Un site doit être mis en ligne avant le {d}.
Œuvre de longue haleine, le projet a traversé plusieurs majorités. {p2} en avait fait une \
promesse dès {a2}, avant d'y renoncer devant le coût, estimé à {n2}~000~euros.
Le soir venu, sur la place, les conversations reprennent. [Un retraité|Un commerçant] hausse les \
épaules~: «~Ça va, ça vient. L'essentiel, c'est que l'on nous écoute.~»
Prochaine étape le {d}, avec la visite {dp2}. D'ici là, les habitants {dv} et des communes \
voisines sont invités à donner leur avis, par écrit ou au guichet.
"""

# Sidebars that only the pretraining articles have: they repeat facts, which teaches to copy.
SIDEBARS = """
Repères à {v}. La rubrique~: {section}. La ville~: {v}. La personne~: {p}. Le chiffre~: {n}. \
Le mot~: {o}.
Repères à {v}. Le chiffre~: {n}. La ville~: {v}. Le mot~: {o}. La rubrique~: {section}. La \
personne~: {p}.
Repères à {v}. La personne~: {p}. La rubrique~: {section}. Le mot~: {o}. La ville~: {v}. Le \
chiffre~: {n}.
Repères à {v}. La ville~: {v}. Le mot~: {o}. Le chiffre~: {n}. La personne~: {p}. La \
rubrique~: {section}.
"""

# Towns, women, men, surnames, days, months; towns that agree without an article.
NAMES = """
Lyon Marseille Toulouse Nice Nantes Montpellier Strasbourg Bordeaux Lille Rennes Reims
Toulon Grenoble Dijon Nîmes Brest Limoges Tours Amiens Metz Besançon Perpignan Orléans Rouen
Mulhouse Caen Nancy Avignon Poitiers Dunkerque Calais Colmar Bourges Quimper Troyes Lorient
Chambéry Béziers Vannes Angers

Alice Anaïs Béatrice Camille Cécile Claire Delphine Élise Emma Florence Hélène Inès Julie
Léa Manon Nadia Noémie Pauline Sarah Zoé

Adrien Antoine Benoît Clément Damien Étienne Fabien François Hugo Jérôme Karim Loïc Marc
Mathieu Nicolas Olivier Pierre Rémi Thomas Vincent

Arnaud Aubert Barbier Benali Bernard Blanchard Bonnet Boyer Brun Carpentier Chevalier
Colin David Diallo Dubois Dufour Dumas Dupont Durand Fabre Faure Fontaine Fournier Garnier
Gauthier Gérard Girard Guérin Guillot Henry Joly Lacroix Lambert Legrand Lemoine Leroux Lopez
Maillard Marchand Martin Masson Mercier Meunier Meyer Michel Morel Nguyen Noël Olivier Perrin
Picard Renard Rivière Robin Rousseau Roux Roy Traoré Vasseur Weber

lundi mardi mercredi jeudi vendredi samedi dimanche

janvier février mars avril mai juin juillet août septembre octobre novembre
décembre
"""
TOWNS, WOMEN, MEN, SURNAMES, DAYS, MONTHS = (names.split() for names in NAMES.split("\n\n"))

NUMBERS = 30  # values of {n} in a subject
SPLITS = ("train", "validation", "test", "pretraining")
FACTOR = 60_000_011  # spreads neighbouring rows over the combinations
MAX_ROWS = 10_000_000  # of a split; no two articles are the same below it
LONG_EVERY = 25  # one article in so many is long, by 8 to 60 paragraphs
PRETRAINING_ROWS = 8000
VOCABULARY = 3072


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("corpus")
    group.add_argument("--output_dir", default="demo", help="new folder to write")
    group.add_argument("--train_rows", type=int, default=2000, help="articles")
    group.add_argument("--validation_rows", type=int, default=200, help="articles")
    group.add_argument("--test_rows", type=int, default=500, help="articles")
    group.add_argument("--seed", type=int, default=0, help="of corpus and model")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", action=argparse.BooleanOptionalAction, default=True, help="make the model too"
    )
    group.add_argument("--pretraining_steps", type=int, default=420, help="updates")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    settings = {"version": VERSION, **vars(args)}
    del settings["output_dir"]
    for name in ("train_rows", "validation_rows", "test_rows"):
        if not 1 <= settings[name] <= MAX_ROWS:
            raise UserError(f"--{name}", "out of range", f"give 1 to {MAX_ROWS}")
    if not 0 <= args.seed < 2**32:
        raise UserError("--seed", "out of range", f"give 0 to {2**32 - 1}")
    if args.pretraining_steps < 1:
        raise UserError("--pretraining_steps", "out of range", "give 1 or more, or --no-model")
    if is_complete(output_dir, settings):
        print(f"{output_dir}: the demo is there already")
        return

    # Everything is made beside the folder and renamed at the end: what is there is complete. Nor is
    # anything left by SIGTERM, with which a launcher ends this.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    final = output_dir.resolve()  # it may be a link to a folder
    with writing(output_dir):
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.TemporaryDirectory(prefix=f"{final.name}.partial-", dir=final.parent)
    with partial:
        folder = Path(partial.name) / "demo"
        folder.mkdir()
        start = time.perf_counter()
        write_corpus(folder, args)
        print(f"corpus: {args.train_rows:,} articles, {time.perf_counter() - start:.1f} s")
        if args.model:
            make_model(folder / "model", args.seed, args.pretraining_steps)
        (folder / "demo.json").write_text(json.dumps(settings, indent=2) + "\n")
        with writing(output_dir):
            folder.rename(final)
    print(f"{output_dir}: made in {time.perf_counter() - start:.0f} s")


def is_complete(output_dir, settings) -> bool:
    """Whether the folder is the demo of these settings; refuse any other that is not empty."""
    try:
        if not any(output_dir.iterdir()):
            return False
        if json.loads((output_dir / "demo.json").read_text()) == settings:
            return True
    except FileNotFoundError:
        if not output_dir.exists():
            return False
    except NotADirectoryError:
        pass
    except ValueError:
        pass
    raise UserError(
        output_dir,
        "not empty, and not the demo of these options",
        "remove it or give another --output_dir",
    )


def write_corpus(folder, args):
    """Write the four files row by row: memory does not grow with the number of rows."""
    for split, rows in (
        ("train", args.train_rows),
        ("validation", args.validation_rows),
        ("test", args.test_rows),
    ):
        wanted = {f"{split}.csv": ("text", "titles")}
        if split == "test":  # the challenge gives no titles with it; these are the answers
            wanted = {"test.csv": ("text",), "test_titles.csv": ("titles",)}
        for name, columns in wanted.items():
            with open(folder / name, "w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(("ID", *columns))
                for row in range(rows):
                    article = make_article(args.seed, split, row)
                    writer.writerow((row, *(article[column] for column in columns)))


def make_article(seed: int, split: str, row: int) -> dict:
    """Return the article of a row, which depends on nothing but the three arguments."""
    rng = random.Random(f"{seed} {split} {row}")
    # The row of the split names one combination of facts, and no two rows name the same: the
    # factor shares no divisor with the number of combinations, and a digit is only ever shifted
    # by the digits that follow it, which could be undone from the last digit to the first.
    code = SPLITS.index(split) * (combinations() // len(SPLITS)) + row + seed * 7_654_321
    code = code * FACTOR % combinations()
    digits = []
    for radix in (len(BLOCKS), len(TOWNS), len(SURNAMES), len(WOMEN + MEN), NUMBERS):
        code, digit = divmod(code, radix)
        digits.append((digit + (code * 2_654_435_761 >> 16)) % radix)
    subject, town, surname, first_name, number = digits
    block = BLOCKS[subject]
    facts = make_facts(rng, TOWNS[town], (WOMEN + MEN)[first_name], SURNAMES[surname])
    number = block["first"] + block["step"] * number
    facts |= {"n": f"{number:,}".replace(",", "\N{NBSP}"), "o": rng.choice(block["objects"])}
    facts |= {"O": facts["o"].capitalize(), "do": de(facts["o"]), "section": block["section"]}

    sentences = [rng.choice(sentence) for sentence in block["sentences"]]
    for context in (rng.choice(REACTIONS), *rng.sample(CONTEXTS, rng.randint(0, 1))):
        sentences.insert(rng.randint(1, len(sentences)), rng.choice(context))
    text = " ".join(sentences).format_map(facts)
    if rng.randrange(LONG_EVERY) == 0:
        pages = itertools.cycle(rng.sample(PAGES, len(PAGES)))
        for page in itertools.islice(pages, rng.randint(8, 60)):
            others = make_facts(rng, facts["v"], *facts["p"].split(" "))
            text += "\n" + rng.choice(page).format_map(others)
    return {"text": text, "titles": block["title"].format_map(facts), "facts": facts}


def combinations() -> int:
    return len(BLOCKS) * len(TOWNS) * len(SURNAMES) * len(WOMEN + MEN) * NUMBERS


def make_facts(rng, town: str, first_name: str, surname: str) -> dict:
    """Return what the templates can name, agreeing with the person, but for {n} and {o}."""
    woman = first_name in WOMEN
    town2 = rng.choice(TOWNS)
    person2 = f"{rng.choice(WOMEN + MEN)} {rng.choice(SURNAMES)}"
    return {
        "v": town,
        "dv": de(town),
        "p": f"{first_name} {surname}",
        "dp": de(f"{first_name} {surname}"),
        "s": surname,
        "il": "elle" if woman else "il",
        "Il": "Elle" if woman else "Il",
        "le": "la" if woman else "le",
        "Le": "La" if woman else "Le",
        "e": "e" if woman else "",
        "j": rng.choice(DAYS),
        "d": f"{rng.randint(2, 28)} {rng.choice(MONTHS)}",
        "v2": town2,
        "dv2": de(town2),
        "p2": person2,
        "dp2": de(person2),
        "a2": rng.randint(1998, 2021),
        "a3": rng.randint(21, 89),
        "a4": rng.randint(3, 15),
        "n2": rng.randint(21, 980),
    }


def de(name: str) -> str:
    return f"d'{name}" if name[0] in "AEIOUHÉ" else f"de {name}"


def choices(template: str) -> list[str]:
    """Return every wording of a template: "[a|b] c" gives "a c" and "b c"."""
    parts = re.split(r"\[(.*?)\]", template.replace("~", "\N{NBSP}"))
    return ["".join(words) for words in itertools.product(*(part.split("|") for part in parts))]


def read_block(block: str) -> dict:
    head, title, *sentences = block.splitlines()
    section, first, step, objects = head.split(" | ")
    return {
        "section": section,
        "first": int(first),
        "step": int(step),
        "objects": objects.split(", "),
        "title": choices(title)[0],
        "sentences": [choices(sentence) for sentence in sentences],
    }


BLOCKS = [read_block(block) for block in SUBJECTS.strip().split("\n\n")]
REACTIONS = [choices(line) for line in REACTIONS.strip().splitlines()]
CONTEXTS = [choices(line) for line in CONTEXTS.strip().splitlines()]
PAGES = [choices(line) for line in PAGES.strip().splitlines()]
SIDEBARS = [choices(line)[0] for line in SIDEBARS.strip().splitlines()]


def make_model(folder, seed: int, steps: int):
    """Train a tokenizer and a small Llama on articles that are in no split of the corpus."""
    with quick_imports():
        import torch
        from torch.nn.utils.rnn import pad_sequence
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.perf_counter()
    documents = list(pretraining_documents(seed))
    tokenizer = make_tokenizer(folder, documents)
    print(f"tokenizer: {len(tokenizer)} tokens, {time.perf_counter() - start:.1f} s", flush=True)
    rows = [
        torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(documents)["input_ids"]
    ]

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,  # all sizes are multiples of 64, the block of NF4
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="eager",  # faster at this size
    )
    model = LlamaForCausalLM(config).train()
    # Heads that begin by finding a token's like and copying it learn to copy facts much sooner
    # ("mimetic initialization", arXiv 2305.09828); so do matrices under Muon.
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(0.5 * attention.v_proj.weight.T)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 20, max(0.02, (1 - step / steps) / 0.6))
        )
        for optimizer in optimizers
    ]

    in_bf16 = bf16_pays(on_cpu=True)
    batches = similar_batches(rows, 16, random.Random(seed))
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        inputs = pad_sequence(batch, batch_first=True)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps} | loss {loss.item():.3f} | {seconds:.1f} s", flush=True)
    model.save_pretrained(folder)
    share(folder / "model.safetensors")


def similar_batches(rows: list, size: int, shuffle: random.Random):
    """Yield batches without end; rows for four are drawn, and sorted by length for less padding."""
    while True:
        drawn = sorted(shuffle.sample(rows, 4 * size), key=len)
        batches = [drawn[start : start + size] for start in range(0, 4 * size, size)]
        yield from shuffle.sample(batches, 4)


def pretraining_documents(seed: int):
    """Yield articles, each with two sidebars: the model learns to take up the facts of a text."""
    for row in range(PRETRAINING_ROWS):
        article = make_article(seed, "pretraining", row)
        text = article["text"].split("\n")[0]
        sidebars = random.Random(f"{seed} sidebars {row}").sample(SIDEBARS, 2)
        yield "\n".join((text, *sidebars)).format_map(article["facts"])


def make_tokenizer(folder, documents):
    """Train a Llama-2-like tokenizer: BPE with bytes for what it has not met, single digits."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir()
    lines = (line for document in documents for line in document.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    run(main)
