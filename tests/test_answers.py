"""The final number of an answer: what counts where the phrase is said, and where it is not."""

import pytest

from dfl_lora.data.answers import canonical, final_number, gold_number
from dfl_lora.data.formats import FINAL_ANSWER, GOLD
from dfl_lora.data.sources import load_rows
from real import real


@pytest.mark.parametrize(("text", "number"), [
    ("She has 2 + 3 = 5 left.\nThe final answer is: 18", "18"),
    ("The final answer is: 18. Now 7 more", "18"),
    ("The final answer is:  18", "18"),
    ("The final answer is:18", "18"),
    ("The final answer is: Ann has 12 apples and 3 pears", "12"),
    ("3 and 4. The final answer is: none", "4"),
    ("The final answer is: 1 The final answer is: 2", "1"),
    ("It is 3, then 4, then 5", "5"),
    ("So it is $1,000.", "1000"),
    ("**1,234,567**", "1234567"),
    ("\\boxed{18}", "18"),
    ("It costs $18.50.", "18.5"),
    ("It costs -$5", "-5"),
    ("It costs $-5", "-5"),
    ("It fell to -3 degrees", "-3"),
    ("It fell to −3 degrees", "-3"),
    ("10-5", "5"),
    ("between $10-$12", "12"),
    ("20 - 5 = 15", "15"),
    ("half is .5", "0.5"),
    ("50%", "50"),
    ("1,2,3", "3"),
    ("The year 2021, 7.", "7"),
])  # fmt: skip
def test_the_number_of_an_answer_is_found(text: str, number: str) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "The final answer is: ", "- $ , .", "####"])
def test_a_text_without_digits_has_no_number(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize("same", [
    ("18", "18.0", "18.", "$18", "018", "18.00"),
    ("1000", "1,000", "$1,000.00"),
    ("0", "-0", "0.0", "-0.00"),
    ("0.5", ".5", "0.50"),
    ("-1.25", "-$1.250", "−1.25"),
    ("100000000000000000000000000000000000", "100000000000000000000000000000000000.0"),
])  # fmt: skip
def test_equal_numbers_are_equal_texts_without_an_exponent(same: tuple[str, ...]) -> None:
    assert {final_number(text) for text in same} == {same[0]}


def test_unequal_numbers_are_unequal_texts() -> None:
    numbers = ["18", "-18", "1.8", "180", "18.01", "0.00000000000000000000000000000000018"]
    assert len({canonical(number) for number in numbers}) == len(numbers)


@pytest.mark.parametrize(("answer", "number"), [
    ("He has 3 * 6 = 18.\n#### 18", "18"),
    ("#### 1,000", "1000"),
    ("#### -5", "-5"),
    ("a #### 1\n#### $2.50", "2.5"),
    ("18", None),
    ("#### none", None),
])  # fmt: skip
def test_a_gold_answer_ends_with_its_number(answer: str, number: str | None) -> None:
    assert gold_number(answer) == number


@pytest.mark.parametrize(("split", "num_rows"), [("train", 7_473), ("test", 1_319)])
def test_every_answer_of_gsm8k_as_it_is_trained_comes_to_its_gold_number(split: str, num_rows: int) -> None:
    (folder,) = real("gsm8k")
    answers = [str(answer) for answer in load_rows(str(folder), "main", split)["answer"]]
    golds = [gold_number(answer) for answer in answers]
    plain = [canonical(answer.rpartition(GOLD)[2].strip()) for answer in answers]
    assert len(answers) == num_rows and golds == plain
    assert [final_number(answer.replace(GOLD, FINAL_ANSWER)) for answer in answers] == golds
