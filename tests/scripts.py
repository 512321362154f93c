"""Texts in twelve scripts, with what tokenizers trip over: accents, final letters, digits, joined emoji, ligatures."""

import random

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
