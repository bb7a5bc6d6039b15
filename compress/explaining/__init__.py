"""Why a compressed model is as fast as it is: where its time went, beside the original's."""
