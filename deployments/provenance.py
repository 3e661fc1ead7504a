"""What a result says of its origin to any program: IPTC's digital source type, as XMP.

EU AI Act article 50 asks providers to mark what a model made so that machines can read it.
Terms: https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

import re
from typing import Literal

SourceType = Literal[
    "algorithmicallyEnhanced", "compositeWithTrainedAlgorithmicMedia", "trainedAlgorithmicMedia"
]
"""The picture itself, improved or cut out; one that a model has changed in part; or the model's."""

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' Iptc4xmpExt:DigitalSourceType="{term}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_TERM = re.compile(rf'DigitalSourceType(?:="|>\s*){re.escape(_VOCABULARY)}(\w+)')


def packet(source_type: SourceType) -> str:
    """An XMP packet that states the source type."""
    return _PACKET.format(term=_VOCABULARY + source_type)


def source_type_of(xmp: str) -> str:
    """The source type that an XMP packet states; empty if it states none."""
    found = _TERM.search(xmp)
    return found[1] if found else ""
