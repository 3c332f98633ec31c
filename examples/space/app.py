"""The page of `pushforward studio` as a Space of Hugging Face."""

from pushforward.studio.page import Shelf, make_page, settings

page = make_page(Shelf())  # or names of models on the hub: Shelf(("owner/model",))

if __name__ == "__main__":
    page.launch(**settings())
