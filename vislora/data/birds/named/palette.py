"""What many of the named species share."""

BLACK, WHITE = (30, 29, 32), (244, 243, 238)
SONGBIRD = ("perched", "standing", "flying")
GARDEN = ("branch", "feeder", "meadow", "snow", "sky")
