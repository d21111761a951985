"""Between pixels, latents and tokens: plain pictures in, pictures and previews out. Knows no prompts and no loop."""
