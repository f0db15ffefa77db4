from __future__ import annotations

import pytest

from nbdeploy.errors import UsageError
from nbdeploy.naming import default_name


@pytest.mark.parametrize(
    ("predict", "model", "notebook", "name"),
    [
        ("classify", "clf", "", "classify"),
        ("predict_sentiment", "clf", "", "predict-sentiment"),
        ("predict_fn", "sentiment_model", "", "sentiment-model"),
        ("predict", "clf2", "/a/Churn Rate.ipynb", "churn-rate"),
        ("my_model_predict", None, "/a/x/Untitled.ipynb", "untitled"),
        ("sentiment.predict", "model", "", "sentiment"),
    ],
)
def test_default_names(predict: str, model: str | None, notebook: str, name: str) -> None:
    """The function's name, else the model's, else the file's; generic names are passed over."""
    assert default_name(predict, model, notebook) == name


def test_no_name_asks_for_one() -> None:
    """Where all names are generic, --name is asked for."""
    with pytest.raises(UsageError, match="--name"):
        default_name("predict", "model", "")
