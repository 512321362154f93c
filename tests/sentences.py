"""Words and tags that a tiny model can learn, texts that break offsets, and texts in twelve scripts."""

import random
from pathlib import Path

from tiny import BAD, GOOD

NAMES = ("Paris", "Zürich")
SHAPES = ("what a {} film", "the {} story was {}", "a {} plot in {}", "{} music and a {} ending", "the acting")


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Make sentences in which praise, blame (of one word or two) and places are entities."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for part in draw.choice(SHAPES).split():
            kind = draw.choice(("GOOD", "BAD", "PLACE")) if part == "{}" else "O"
            chosen = {"GOOD": GOOD, "BAD": BAD, "PLACE": NAMES, "O": (part,)}[kind]
            length = draw.choice((1, 2)) if kind == "BAD" else 1
            words += [draw.choice(chosen) for _ in range(length)]
            tags += ["O"] if kind == "O" else [f"B-{kind}", f"I-{kind}"][:length]
        rows.append({"words": words, "tags": tags})
    return rows


def write_conll(path: Path, rows: list[dict[str, list[str]]]) -> Path:
    """Write a word and its tag a line."""
    path.write_text(
        "\n".join("".join(f"{word}\t{tag}\n" for word, tag in zip(*row.values(), strict=True)) for row in rows),
        encoding="utf-8",
    )
    return path


PIECES = (
    *("wonderful", "film", "Zürich", "naïve", "Straße", "a", "2", "the", "日本語", "Привет", "x" * 40),
    *("e\u0301", "n\u0303\u0323", "\u0301", "\u200d", "\ufeff", "\u00ad", "\x00", "\ufffd", "\U0001f600"),
    *("\U0001f469\u200d\U0001f4bb", "\U0001f1e8\U0001f1ed", "\u2764\ufe0f", "שלום", "\u202eעברית\u202c", "مرحبا", "ﷺ"),
    *("[SEP]", "[MASK]", "@a", "#b", "http://x.y/z?q=1", "...", "—", "'s", "½", "ß", "İ", "ǆ", "\u1e9b\u0323"),
)
SPACES = (" ", " ", " ", "", "", "\t", "\n", "\u00a0", "\u3000", "\u2028", "  \r\n")


def fuzzed_texts(count: int = 1000) -> list[str]:
    """Make texts that break offsets: what normalisation makes longer or shorter, joins, drops or turns around."""
    draw = random.Random(0)
    texts = ["", " ", "\u0301", "\ufeff", "y" * 10_000, "\U0001f600" * 300, "e\u0301" * 5_000, "日" * 200]
    while len(texts) < count:
        size = draw.choice((1, 3, 8, 20, 120))
        texts.append("".join(draw.choice(PIECES) + draw.choice(SPACES) for _ in range(size)))
    return texts


# In twelve scripts, with what tokenizers trip over: accents, final letters, digits, joined emoji, ligatures.
SENTENCES = {
    "Latin": "Tous les êtres humains naissent libres et égaux. Straße, Żółw, İstanbul, ﬁne ½ naïve ĳ Ǆ Việt Nam",
    "Cyrillic": "Все люди рождаются свободными и равными в своём достоинстве. Їжак, Ёлка, Ђорђе",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. ΟΔΟΣ ΟΔΥΣΣΕΥΣ Σίσυφος",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وُهِبوا عقلًا ٣٤٥، ﷺ",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. בְּרֵאשִׁית בָּרָא",
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। क़िला १२३",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน ในเกียรติศักดิ์ และสิทธิ น้ำ ๑๒๓",
    "Han": "人人生而自由， 在尊严和权利上一律平等。 他們賦有理性和良心， 𠮷野家 ㈱ ＡＢＣ１２３",
    "Kana": "すべての人間は、 生まれながらにして 自由であり、 ガギグゲゴ パピプペポ ｶﾞｷﾞ ㌔ が〜々ー",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 각 ㄱㄴㄷ",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი ᲗᲑᲘᲚᲘᲡᲘ",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர் கொ",
}
_BETWEEN = (" ", " ", " ", ", ", "! ", "  ", "\u00a0", "-", " 😀👩‍💻 ", "\n", "'s ")


def texts_of_scripts(count: int = 20, seed: int = 0) -> list[str]:
    """Draw that many texts of each script, of 1 to 14 words, some in capitals."""
    draw, texts = random.Random(seed), []
    for sentence in SENTENCES.values():
        words = sentence.split()
        for _ in range(count):
            text = "".join(draw.choice(words) + draw.choice(_BETWEEN) for _ in range(draw.randint(1, 14))).strip()
            texts.append(text.upper() if draw.random() < 0.3 else text)
    return texts
