package attach

const serveVerb = "serve"

func serveMain([]string) {}
