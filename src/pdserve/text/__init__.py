"""Text to token ids and back: tokenizer, incremental detokenizer, stop strings, chat templates.

Serves the HTTP edge. Knows no engine and no torch; everything here is a plain object without
threads or clocks, made once (`Tokenizer`, `ChatTemplate`) or once per choice (`Detokenizer`,
`StopStrings`).
"""
