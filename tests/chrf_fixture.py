"""Makes tests/fixtures/chrf.json: pairs of texts with the scores that sacreBLEU gives them. Needs sacrebleu from PyPI.
The texts are our own. Run in the repository's root: python tests/chrf_fixture.py"""

import json
import pathlib

import sacrebleu

PAIRS = [
    # Nothing, white space, single letters, shorter than the longest runs.
    ("", ""),
    ("", "a reference"),
    ("an answer", ""),
    (" \t\n", "   "),
    ("a", "a"),
    ("a", "b"),
    ("क", "क"),
    ("क", "की"),
    ("ab", "abc"),
    ("abcde", "abcde"),
    ("abcdef", "abcde"),
    # The same, the same but for white space, the same letters otherwise arranged, repeated runs.
    ("The bus leaves at nine.", "The bus leaves at nine."),
    ("The bus  leaves\u00a0at\u3000nine.", "The bus leaves at nine."),
    ("Thebus\u001cleaves\u0085at\u2028nine.", "The bus leaves at nine."),
    ("no on no on", "on no on no"),
    ("aaaaaaaaaa", "aaa"),
    ("aaa", "aaaaaaaaaa"),
    ("The bus leaves at nine.", "the BUS leaves at 9!"),
    # The served languages: an answer beside another way to say it.
    ("मुझे यह लाल कमीज़ पसंद है।", "मुझे वह नीली कमीज पसंद है।"),
    ("कमीज\u093c", "कमी\u095b"),
    ("बाज़ार सुबह सात बजे खुलता है।", "बाज़ार सात बजे खुल जाता है।"),
    ("আমার ভাই নদীর ধারে থাকে।", "আমার ভাই নদীর পাশে বাস করে।"),
    ("আজ বৃষ্টি হবে।", "আজ বৃষ্টি হতে পারে।"),
    ("எனக்கு பசிக்கிறது.", "எனக்கு மிகவும் பசிக்கிறது."),
    ("இந்தப் பேருந்து எங்கே போகிறது?", "இந்த பஸ் எங்கு செல்கிறது?"),
    ("నాకు ఈ పాట చాలా ఇష్టం.", "ఈ పాట నాకు ఎంతో ఇష్టం."),
    ("મને થોડી ચા આપો.", "કૃપા કરીને મને ચા આપો."),
    ("मला थोडे पाणी द्या.", "कृपया मला पाणी द्या."),
    ("उद्या सुट्टी आहे.", "उद्या शाळेला सुट्टी आहे."),
    ("یہ کتاب بہت اچھی ہے۔", "یہ بہت اچھی کتاب ہے۔"),
    ("آپ کا نام کیا ہے؟", "آپ کا نام کیا ہے؟"),
    ("ਮੈਨੂੰ ਭੁੱਖ ਲੱਗੀ ਹੈ।", "ਮੈਨੂੰ ਬਹੁਤ ਭੁੱਖ ਲੱਗੀ ਹੈ।"),
    ("ನನ್ನ ಮನೆ ಹತ್ತಿರದಲ್ಲಿದೆ.", "ನನ್ನ ಮನೆ ಇಲ್ಲಿಗೆ ಹತ್ತಿರ."),
    ("ഇന്ന് നല്ല ചൂടാണ്.", "ഇന്ന് വളരെ ചൂടാണ്."),
    ("र\u094d\u200dया", "र\u094dया"),
    ("मलाई यो गीत मन पर्छ।", "मलाई यो गीत धेरै मन पर्छ।"),
    ("Where can I buy a ticket?", "Where do I get tickets?"),
    # Other scripts, and an answer in the wrong one.
    ("Я люблю читать книги.", "Я очень люблю книги."),
    ("Πού είναι ο σταθμός;", "Πού βρίσκεται ο σταθμός;"),
    ("我想喝一杯热茶。", "我要一杯热茶。"),
    ("駅はどこですか。", "駅はどちらですか。"),
    ("오늘 날씨가 좋아요.", "오늘은 날씨가 참 좋네요."),
    ("أين محطة القطار؟", "أين تقع محطة القطار؟"),
    ("איפה התחנה?", "איפה נמצאת התחנה?"),
    ("ฉันชอบกินมะม่วง", "ฉันชอบมะม่วงมาก"),
    ("სად არის სადგური?", "სად მდებარეობს სადგური?"),
    ("ጤና ይስጥልኝ ወዳጄ", "ጤና ይስጥልኝ"),
    ("good morning", "सुप्रभात"),
    # Characters beyond the basic plane, and clusters of several characters.
    ("👩‍🌾🌾🌾 ok", "👩‍🌾🌾 ok"),
    ("e\u0301te\u0301", "été"),
    ("𝒜𝒷𝒸 𑀓𑀔", "𝒜𝒷𝒹 𑀓𑀔𑀕"),
    ("12,50 €", "12.50 €"),
]

metric = sacrebleu.CHRF()
pairs = [
    {"hypothesis": hypothesis, "reference": reference, "score": metric.sentence_score(hypothesis, [reference]).score}
    for hypothesis, reference in PAIRS
]
corpus = metric.corpus_score([h for h, _ in PAIRS], [[r for _, r in PAIRS]])
fixture = {
    "made_by": f"tests/chrf_fixture.py with sacrebleu {sacrebleu.__version__}",
    "signature": str(metric.get_signature()),
    "corpus_score": corpus.score,
    "pairs": pairs,
}
path = pathlib.Path("tests/fixtures/chrf.json")
path.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
print(f"{path}: {len(pairs)} pairs, corpus {corpus.score:.4f}")
