"""The fence runner: it must fail on wrong output and on errors, or every green fence means nothing."""

import textwrap

import pytest

from tests.fences import fences, is_excused


@pytest.fixture
def run(tmp_path):
    """Write a README and give its fences, ready to evaluate."""

    def run_text(text):
        (tmp_path / "README.md").write_text(textwrap.dedent(text))
        examples = list(fences(tmp_path))
        for example in examples:
            example.evaluate()
        return examples

    return run_text


def test_a_fence_that_prints_what_it_says_passes(run):
    (example,) = run("""
        ```python
        print("salt")
        #> salt
        ```
    """)

    assert not is_excused(example)


def test_wrong_output_fails(run):
    with pytest.raises(AssertionError, match="the fence prints something else"):
        run("""
            ```python
            print("salt")
            #> pepper
            ```
        """)


def test_missing_output_fails(run):
    with pytest.raises(AssertionError, match="the fence prints something else"):
        run("""
            ```python
            x = 1
            #> 1
            ```
        """)


def test_output_without_a_claim_passes(run):
    run("""
        ```python
        print("anything")
        ```
    """)


def test_an_exception_fails(run):
    with pytest.raises(ZeroDivisionError):
        run("""
            ```python
            1 / 0
            ```
        """)


def test_await_works_at_top_level_and_its_errors_fail(run):
    run("""
        ```python
        import asyncio

        print(await asyncio.sleep(0, "slept"))
        #> slept
        ```
    """)
    with pytest.raises(TimeoutError):
        run("""
            ```python
            import asyncio

            async with asyncio.timeout(0):
                await asyncio.sleep(1)
            ```
        """)


def test_fences_of_one_file_share_names(run):
    run("""
        ```python
        tide = "low"
        ```

        Later:

        ```python title="later.py"
        print(tide)
        #> low
        ```
    """)


def test_an_indented_fence_runs(run):
    run("""
        * a list item

            ```python
            print("inside")
            #> inside
            ```
    """)


def test_an_excused_fence_is_skipped_with_its_reason(run):
    with pytest.raises(pytest.skip.Exception, match="needs a GPU"):
        run("""
            <!-- not run: needs a GPU -->

            ```python
            1 / 0
            ```
        """)


def test_fences_of_docstrings_run_without_the_names_of_their_module(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "module.py").write_text(
        'secret = 1\n\n\ndef f():\n    """Do.\n\n    ```python\n    print(secret)\n    ```\n    """\n'
    )
    (example,) = fences(tmp_path)

    with pytest.raises(NameError, match="secret"):
        example.evaluate()


def test_few_fences_are_excused():
    found = list(fences())
    excused = [f"{example.path}:{example.line}" for example in found if is_excused(example)]

    assert len(excused) <= 0.05 * len(found), excused
