"""Networks that no library ships for our versions, written natively and loaded strictly."""
