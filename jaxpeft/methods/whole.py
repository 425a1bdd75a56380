"""Methods whose change has no part: they act on whole columns of a weight."""

from jaxpeft.sites import Sites


def check_whole(who: str, sites: Sites) -> None:
    """Raises ValueError where a part of the outputs is selected; names the weight."""
    for site in sites.values():
        if site.part is not None:
            raise ValueError(
                f"`{who}`: a part of the columns of '{site.path}' is selected ({site.part}), but "
                "the method acts on all of them. Select the weight, or use `lora`."
            )
