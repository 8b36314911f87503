"""Messages by the keys and values in them, so that sentences can be worded anew."""

import re


def mentions(*words: object) -> str:
    """A pattern for ``pytest.raises(match=...)``: a message that holds each of ``words``, in any order.

    Where a word begins or ends with a letter or a digit, so does it in the message: 1 is not in "10", nor "rank" in
    "rank_0". A small first letter may be a capital there, as at the beginning of a sentence.
    """

    def pattern(word: str) -> str:
        first = f"[{word[0]}{word[0].upper()}]" if word[0].islower() else re.escape(word[0])
        before = r"(?<!\w)" if word[0].isalnum() else ""
        after = r"(?!\w)" if word[-1].isalnum() else ""
        return f"(?=.*{before}{first}{re.escape(word[1:])}{after})"

    return r"(?s)\A" + "".join(pattern(str(word)) for word in words)
