// Renders the template of a Modelfile as Ollama does: Go's own engine, given Messages and System.
// go run ollama_template.go TEMPLATE_FILE < messages.json
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	text, err := os.ReadFile(os.Args[1])
	check(err)
	var messages []message
	check(json.NewDecoder(os.Stdin).Decode(&messages))
	var system []string
	for _, m := range messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(string(text))
	check(err)
	given := map[string]any{"Messages": messages, "System": strings.Join(system, "\n\n"), "Response": ""}
	check(parsed.Execute(os.Stdout, given))
}
