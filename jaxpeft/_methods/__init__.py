"""Fine-tuning methods, one file per method or tight family; `jaxpeft` exports them."""
