"""Imported by every process of the tests: archives are made by the hundred here, and a few short samples each will do."""

import sculptor.model.samples

sculptor.model.samples.TOKENS, sculptor.model.samples.LENGTH, sculptor.model.samples.CHAT_LENGTH = 256, 16, 32
