"""What every component has, and what the components in this room share.

All but `model_files` is in `sftmix.common.component`, below the options, of which one is a row format.
"""

import os

from sftmix.common.component import Component as Component
from sftmix.common.component import Need as Need
from sftmix.common.component import all_parts as all_parts
from sftmix.common.component import check_labels as check_labels
from sftmix.common.component import code_of as code_of
from sftmix.common.component import files_of as files_of
from sftmix.common.component import missing_package as missing_package
from sftmix.common.component import plain as plain
from sftmix.common.component import require as require
from sftmix.common.component import require_one_of as require_one_of
from sftmix.disk.places import place_of
from sftmix.options.reference import ReferenceModel


def model_files(model: ReferenceModel) -> list[str]:
    """Return the path, if there is one, and the file of the template, if that is one and not a template's name."""
    template = os.path.expanduser(model.template or "")
    return [*filter(None, [model.path]), *([template] if os.path.isfile(place_of(template)) else [])]
